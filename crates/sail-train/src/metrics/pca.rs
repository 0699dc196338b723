//! Principal components: the directions in which points differ most.
//!
//! Dimension letters: n points, d their width, k components.

use tch::{Kind, Tensor};

use crate::error::{Error, Result};

/// A projection to the first principal components of the points that it was made from.
#[derive(Debug)]
pub struct Pca {
    mean_d: Tensor,
    components_kd: Tensor,
    /// The share of the variance that each component has.
    pub explained: Vec<f64>,
}

impl Pca {
    /// The first `k` components of points, from the eigenvectors of their covariance in double precision. The largest
    /// entry of each is positive, as in scikit-learn.
    ///
    /// # Errors
    /// [`Error::Usage`] for fewer points or dimensions than components, and for points that are all the same; those of
    /// libtorch.
    pub fn new(x_nd: &Tensor, k: i64) -> Result<Self> {
        let (n, d) = x_nd.size2()?;
        if n <= k || d < k {
            return Err(Error::usage(
                format!("{n} points of {d} dimensions have no {k} principal components"),
                "give more images",
            ));
        }
        let x_nd = x_nd.to_kind(Kind::Double);
        let mean_d = x_nd.f_mean_dim([0].as_slice(), false, Kind::Double)?;
        let x_nd = &x_nd - &mean_d;
        let covariance_dd = x_nd.f_transpose(0, 1)?.f_matmul(&x_nd)? / (n - 1) as f64;
        // In ascending order, one in each column.
        let (variances_d, vectors_dd) = covariance_dd.f_linalg_eigh("L")?;
        let components_kd = vectors_dd.f_narrow(1, d - k, k)?.f_flip([1])?.f_transpose(0, 1)?;
        let largest_k = components_kd.f_abs()?.f_argmax(-1, true)?;
        let signs_k = components_kd.f_gather(1, &largest_k, false)?.f_sign()?;
        let total = variances_d.f_sum(Kind::Double)?.f_double_value(&[])?;
        if !(total.is_finite() && total > 0.0) {
            return Err(Error::usage(
                format!("{n} points of {d} dimensions are all the same, or not finite"),
                "are the weights broken? look at the losses of the run that made them",
            ));
        }
        let first_k = variances_d.f_narrow(0, d - k, k)?.f_flip([0])?;
        let explained = Vec::<f64>::try_from(first_k / total)?;
        Ok(Self { mean_d, components_kd: components_kd * signs_k, explained })
    }

    /// Points `[n, d]` along the components, `[n, k]` in double precision.
    ///
    /// # Errors
    /// Those of libtorch, for points of another width.
    pub fn project(&self, x_nd: &Tensor) -> Result<Tensor> {
        let centred_nd = x_nd.to_kind(Kind::Double).f_sub(&self.mean_d)?;
        Ok(centred_nd.f_matmul(&self.components_kd.f_transpose(0, 1)?)?)
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    #[test]
    fn points_without_a_spread_have_no_components() {
        let same = Tensor::ones([5, 3], (Kind::Float, Device::Cpu));
        let message = Pca::new(&same, 2).unwrap_err().to_string();
        assert!(message.contains("all the same") && message.contains("hint:"), "{message}");
        assert!(Pca::new(&(&same / 0.0), 2).is_err());
    }
}
