//! What GPUs compute at most, as their makers' data sheets say: the table that model FLOPs utilisation is measured
//! against, and that planning takes its default from.
//!
//! bf16 is that of the tensor cores without sparsity, with sums in fp32, and TF32, where there is bf16, half of it; fp32 is that
//! of the other cores, since `fp32` rounds nothing to TF32. Names are those that the
//! CUDA driver gives a whole GPU; a part of one (MIG) has another name and is not in the table.
//!
//! Sources: NVIDIA's data sheets "A100 Tensor Core GPU", "H100 Tensor Core GPU", "H200 Tensor Core GPU", "Blackwell
//! Architecture Technical Brief" (HGX B200, GB200), "L40S", "L40", "L4", "A10", "A30", "A40" and "V100", and the
//! white papers "Ada GPU Architecture" and "Ampere GA102 GPU Architecture" (the `GeForce`s). Where a sheet gives figures with
//! sparsity alone, half of them.

use crate::config::Precision;

/// TFLOP/s of a GPU.
struct Gpu {
    names: &'static [&'static str],
    /// None without tensor cores for it.
    bf16: Option<f64>,
    fp32: f64,
}

/// Of an H100 SXM in bf16, TFLOP/s.
pub const H100_SXM: f64 = 989.0;

const fn gpu(names: &'static [&'static str], bf16: f64, fp32: f64) -> Gpu {
    Gpu { names, bf16: Some(bf16), fp32 }
}

static GPUS: &[Gpu] = &[
    gpu(&["NVIDIA GB200"], 2500.0, 80.0),
    gpu(&["NVIDIA B200"], 2250.0, 75.0),
    gpu(&["NVIDIA H200"], H100_SXM, 67.0),
    gpu(&["NVIDIA H200 NVL"], 835.0, 60.0),
    gpu(&["NVIDIA H100 80GB HBM3"], H100_SXM, 67.0),
    gpu(&["NVIDIA H100 NVL"], 835.0, 60.0),
    gpu(&["NVIDIA H100 PCIe"], 756.0, 51.0),
    gpu(
        &["NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB", "NVIDIA A100-PCIE-40GB", "NVIDIA A100 80GB PCIe"],
        312.0,
        19.5,
    ),
    gpu(&["NVIDIA A40"], 149.7, 37.4),
    gpu(&["NVIDIA A30"], 165.0, 10.3),
    gpu(&["NVIDIA A10"], 125.0, 31.2),
    gpu(&["NVIDIA L40S"], 362.0, 91.6),
    gpu(&["NVIDIA L40"], 181.0, 90.5),
    gpu(&["NVIDIA L4"], 121.0, 30.3),
    gpu(&["NVIDIA GeForce RTX 4090"], 165.2, 82.6),
    gpu(&["NVIDIA GeForce RTX 3090"], 71.0, 35.6),
    Gpu { names: &["Tesla V100-SXM2-16GB", "Tesla V100-SXM2-32GB"], bf16: None, fp32: 15.7 },
    Gpu { names: &["Tesla V100-PCIE-16GB", "Tesla V100-PCIE-32GB"], bf16: None, fp32: 14.0 },
];

/// What a GPU of this name computes at most, TFLOP/s; None where that is not known, and for `auto`.
pub fn peak_tflops(name: &str, precision: Precision) -> Option<f64> {
    let gpu = GPUS.iter().find(|gpu| gpu.names.contains(&name))?;
    match precision {
        Precision::Bf16 => gpu.bf16,
        Precision::Tf32 => gpu.bf16.map(|bf16| bf16 / 2.0),
        Precision::Fp32 => Some(gpu.fp32),
        Precision::Auto => None,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_gpu_is_known_by_its_whole_name() {
        for (name, precision, expected) in [
            ("NVIDIA H100 80GB HBM3", Precision::Bf16, Some(989.0)),
            ("NVIDIA H100 80GB HBM3", Precision::Fp32, Some(67.0)),
            ("NVIDIA H100 PCIe", Precision::Bf16, Some(756.0)),
            ("NVIDIA A100-SXM4-80GB", Precision::Bf16, Some(312.0)),
            ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", Precision::Bf16, None),
            ("Tesla V100-SXM2-16GB", Precision::Bf16, None),
            ("Tesla V100-SXM2-16GB", Precision::Fp32, Some(15.7)),
            ("NVIDIA A100-SXM4-80GB", Precision::Tf32, Some(156.0)),
            ("Tesla V100-SXM2-16GB", Precision::Tf32, None),
            ("NVIDIA H100 80GB HBM3", Precision::Auto, None),
        ] {
            assert_eq!(peak_tflops(name, precision), expected, "{name} {precision:?}");
        }
    }

    #[test]
    fn no_name_is_there_twice() {
        let names: Vec<&str> = GPUS.iter().flat_map(|gpu| gpu.names).copied().collect();
        assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len());
    }
}
