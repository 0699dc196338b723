//! Operations of one device against the CPU's.

use sail_model::attention::{Segments, Visibility, packed_attention};
use sail_torch::{
    AdamWOptions, AdamWSlot, foreach_mul, fused_adamw, has_varlen_attention, linear_cross_entropy, linears,
    rms_norm, rotate, squared_norms, swiglu, upload,
};
use tch::{Device, Kind, Tensor};

use crate::table::{Figure, Table};

/// Makes the checks.
pub(crate) fn check(table: &mut Table, device: Device) {
    for (kind, limit) in [(Kind::Float, 1e-5), (Kind::BFloat16, 1e-2)] {
        table.row(&format!("matmul {} against the CPU", name(kind)), || matmul(device, kind, limit));
    }
    for (kind, limit) in [(Kind::Float, 1e-5), (Kind::BFloat16, 3e-2)] {
        table.row(&format!("operations of a block and the loss, {}", name(kind)), || {
            block(device, kind, limit)
        });
    }
    table.row("AdamW, norm and scale against the CPU", || optimizer(device));
    for visibility in [Visibility::Causal, Visibility::Full] {
        for head_dim in [64, 128] {
            let what = format!("attention of segments, {visibility:?}, {head_dim} wide");
            table.row(&what, || attention(device, visibility, head_dim));
        }
    }
    table.row("uploads, read as soon as they are queued", || uploads(device));
    table.row("device selection and memory figures", || {
        sail_torch::set_device(device)?;
        let peak = sail_torch::memory_peak(device)?;
        Ok(peak.map_or("the CPU has none".to_owned(), |peak| {
            format!("peak {} MiB in tensors, {} MiB taken", peak.allocated >> 20, peak.reserved >> 20)
        }))
    });
}

/// `fp32` or `bf16`.
pub(crate) fn name(kind: Kind) -> &'static str {
    if kind == Kind::Float { "fp32" } else { "bf16" }
}

/// The largest difference as a share of the largest value expected.
fn difference(found: &Tensor, expected: &Tensor) -> f64 {
    let [found, expected] =
        [found, expected].map(|x| x.detach().to_device(Device::Cpu).to_kind(Kind::Double));
    let largest = expected.abs().max().double_value(&[]);
    (found - expected).abs().max().double_value(&[]) / largest
}

/// The largest, or what is not a number where one is not, which `f64::max` would pass over.
fn worst(differences: impl Iterator<Item = f64>) -> f64 {
    differences.fold(0.0, |worst, next| if next > worst || next.is_nan() { next } else { worst })
}

fn within(what: &str, difference: f64, limit: f64) -> Figure {
    let figure = format!("{what}{difference:.1e} of the largest value");
    // Also false for what is not a number.
    if difference <= limit { Ok(figure) } else { Err(format!("{figure}, more than {limit:.0e}").into()) }
}

fn matmul(device: Device, kind: Kind, limit: f64) -> Figure {
    let [a, b] = [0; 2].map(|_| Tensor::randn([512, 512], (kind, Device::Cpu)));
    let expected = a.to_kind(Kind::Float).matmul(&b.to_kind(Kind::Float));
    within("", difference(&a.to_device(device).matmul(&b.to_device(device)), &expected), limit)
}

/// Norm, linear maps, gate, rotation, head and loss, one after the other, with the gradients of all that goes in, against the
/// same in fp32 on the CPU.
fn block(device: Device, kind: Kind, limit: f64) -> Figure {
    const ROWS: i64 = 96;
    const WIDTH: i64 = 128;
    const VOCAB: i64 = 300;
    let shapes = [[ROWS, WIDTH].as_slice(), &[WIDTH], &[WIDTH, WIDTH], &[WIDTH, WIDTH], &[VOCAB, WIDTH]];
    // Of weights a tenth, so that neither gates nor scores are far out.
    let drawn = shapes.map(|shape| Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(kind) * 0.1);
    let angles = Tensor::randn([ROWS, 1, WIDTH / 8], (Kind::Float, Device::Cpu));
    let targets: Vec<i64> = (0..ROWS).map(|row| row * 7 % VOCAB).collect();
    let made = |device: Device, kind: Kind| -> sail_torch::Result<Vec<Tensor>> {
        let on_device = |x: &Tensor| -> sail_torch::Result<Tensor> {
            let values =
                Vec::<f32>::try_from(x.to_kind(Kind::Float).flatten(0, -1)).expect("invariant: floats");
            Ok(upload(&values, device)?.view(&x.size()[..]).to_kind(kind))
        };
        let inputs = drawn.iter().map(|x| Ok(on_device(x)?.set_requires_grad(true)));
        let inputs = inputs.collect::<sail_torch::Result<Vec<Tensor>>>()?;
        let [x, norm, gate, up, head] = &inputs[..] else { unreachable!("invariant: as many as were drawn") };
        let n = rms_norm(x, norm, 1e-6)?;
        let [gate, up] = linears(&n, [(gate, None), (up, None)], None)?;
        let heads = swiglu(&gate, &up)?.view([ROWS, 4, WIDTH / 4]);
        let turned = rotate(&heads, &on_device(&angles.cos())?, &on_device(&angles.sin())?)?;
        let rows = turned.flatten(1, 2) + x;
        let targets = upload(&targets, device)?;
        let weights = upload(&[0.5f32; ROWS as usize], device)?;
        let loss = linear_cross_entropy(&rows, head, &targets, &weights)?.sum;
        let mut all = Tensor::run_backward(&[&loss], &inputs, false, false);
        all.extend([loss, rows]);
        Ok(all)
    };
    let (found, expected) = (made(device, kind)?, made(Device::Cpu, Kind::Float)?);
    let differences = found.iter().zip(&expected).map(|(found, expected)| difference(found, expected));
    within("", worst(differences), limit)
}

/// The device has nothing else to do, so that an operation that does not wait for a copy reads what was there before; memory is
/// used again and again, so that a copy that does not wait for its last reader is seen as well.
fn uploads(device: Device) -> Figure {
    const VALUES: usize = 16 << 20;
    let means = (0..8u8).map(|i| -> sail_torch::Result<Tensor> {
        let x = upload(&vec![f32::from(i); VALUES], device)?;
        let before = x.mean(Kind::Double);
        // Its last reader is queued behind much work when its memory is given back.
        let busy =
            (0..20).fold(x.narrow(0, 0, 1 << 20).view([1024, 1024]), |y, _| y.matmul(&y).clamp(0.0, 1.0));
        Ok(Tensor::stack(&[before, x.mean(Kind::Double), busy.mean(Kind::Double)], 0))
    });
    for (i, means) in means.collect::<sail_torch::Result<Vec<Tensor>>>()?.iter().enumerate() {
        let means = Vec::<f64>::try_from(means)?;
        if means[..2] != [i as f64; 2] {
            return Err(format!("of {i} everywhere the means are {:?}", &means[..2]).into());
        }
    }
    Ok(format!("8 of {} MiB have their values", VALUES >> 18))
}

/// A few steps of what the optimizer does with gradients, on both.
fn optimizer(device: Device) -> Figure {
    let start: Vec<[Tensor; 2]> = [1, 700, 70_000]
        .map(|numel| [0; 2].map(|_| Tensor::randn([numel], (Kind::Float, Device::Cpu))))
        .into();
    let updated = |device: Device| -> sail_torch::Result<Vec<Tensor>> {
        let slot = |[param, grad]: &[Tensor; 2]| AdamWSlot {
            param: param.copy().to_device(device),
            grad: grad.copy().to_device(device),
            exp_avg: param.zeros_like().to_device(device),
            exp_avg_sq: param.zeros_like().to_device(device),
            step: Tensor::zeros([], (Kind::Float, device)),
        };
        let slots: Vec<AdamWSlot> = start.iter().map(slot).collect();
        let grads: Vec<Tensor> = slots.iter().map(|slot| slot.grad.shallow_clone()).collect();
        for _ in 0..5 {
            let factor: Tensor = 3f64 / squared_norms(&grads)?.sum(Kind::Double).sqrt();
            foreach_mul(&grads, &factor.to_kind(Kind::Float))?;
            let options = AdamWOptions { lr: 1e-2, betas: (0.9, 0.95), eps: 1e-8, weight_decay: 0.1 };
            fused_adamw(&slots, options)?;
        }
        Ok(slots.into_iter().map(|slot| slot.param).collect())
    };
    let (found, expected) = (updated(device)?, updated(Device::Cpu)?);
    let differences = found.iter().zip(&expected).map(|(found, expected)| difference(found, expected));
    within("", worst(differences), 1e-5)
}

/// Attention over segments in bf16, forward and backward, against libtorch's own in fp32, a segment at a time.
fn attention(device: Device, visibility: Visibility, head_dim: i64) -> Figure {
    let lengths = [1, 37, 128, 300];
    let rows: i64 = lengths.iter().sum();
    let segments = Segments::of_lengths(lengths.into())?;
    let draw = |heads| Tensor::randn([rows, heads, head_dim], (Kind::BFloat16, device));
    let inputs = [8, 2, 2].map(|heads| draw(heads).set_requires_grad(true));
    let exact = [0, 1, 2].map(|i| inputs[i].detach().to_kind(Kind::Float).set_requires_grad(true));
    let flash = has_varlen_attention(&inputs[0]);
    if device.is_cuda() && !flash {
        return Err("the variable-length kernel does not take what it is made for".into());
    }
    let found = packed_attention(&inputs[0], &inputs[1], &inputs[2], &segments, visibility);
    let mut start = 0;
    let parts = lengths.map(|length| {
        let part = |x: &Tensor| x.narrow(0, start, length).transpose(0, 1).unsqueeze(0);
        let (causal, none) = (visibility == Visibility::Causal, None::<&Tensor>);
        let [q, k, v] = exact.each_ref().map(part);
        start += length;
        let out = Tensor::scaled_dot_product_attention(&q, &k, &v, none, 0.0, causal, None, true);
        out.squeeze_dim(0).transpose(0, 1)
    });
    let expected = Tensor::cat(&parts, 0);
    let probe = draw(8);
    let gradients = |y: &Tensor, inputs: &[Tensor]| {
        let scalar = (y * probe.to_kind(y.kind())).sum(Kind::Float);
        Tensor::run_backward(&[scalar], inputs, false, false)
    };
    let gradients = gradients(&found, &inputs).into_iter().zip(gradients(&expected, &exact));
    let worst = worst(gradients.map(|(found, expected)| difference(&found, &expected)));
    let how = if flash { "flash" } else { "no flash here" };
    let forward = within("", difference(&found, &expected), 2e-2)?;
    within(&format!("{how}: {forward}, gradients "), worst, 3e-2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_a_number_is_never_within_a_limit() {
        for differences in [[f64::NAN, 1.0, 2.0], [1.0, f64::NAN, 2.0], [1.0, 2.0, f64::NAN]] {
            assert!(within("", worst(differences.into_iter()), 3.0).is_err());
        }
        assert!(within("", worst([1.0, 3.0, 2.0].into_iter()), 3.0).is_ok());
        assert!(within("", worst([1.0, 3.0, 2.0].into_iter()), 2.9).is_err());
    }
}
