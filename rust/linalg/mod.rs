//! Linear algebra on matrices that are read and never held.
//!
//! A [`Matrix`] is a sum of terms, read as panels of whole rows. [`rsvd`] finds its leading singular triplets in a few passes over the
//! panels, [`thin`] those of a product of thin factors; [`gram`] gathers the Gram matrix of the smaller side in f64 and gives the trailing triplets, or the
//! whole spectrum.
//!
//! There is no library below this module. Libraries of dense linear algebra choose instruction sets, block sizes and thread counts by
//! what they find the processor to be, and each choice is another order of sums; here every sum has one order, set by shapes alone, so that results are the
//! same bits for any thread count, memory budget and SIMD level. What is large are two kernels, [`crate::simd::kernel::multiply`] and
//! [`crate::simd::kernel::cross`].

pub mod dense;
pub mod eigen;
pub mod gram;
mod inverse;
pub(crate) mod packed;
mod panel;
pub mod plan;
pub mod rsvd;
mod scale;
pub mod thin;
pub(crate) mod whole;

pub use panel::Matrix;

/// How many singular triplets of a matrix to take.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Rank {
    /// So many, or all that there are.
    Fixed(usize),
    /// The fewest that hold this share of the sum of squares.
    Energy(f64),
    /// The fewest that leave at most this share of the norm.
    Error(f64),
    /// Those above the largest singular value of the matrix with random signs: what stands out of the noise of storing it.
    Noise,
}

/// Singular triplets: `A` is near `u diag(s) v^T`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Triplets {
    /// How many.
    pub rank: usize,
    /// Left vectors, `rows x rank`, row by row.
    pub u: Vec<f32>,
    /// Singular values, descending.
    pub s: Vec<f64>,
    /// Right vectors, `columns x rank`, row by row.
    pub v: Vec<f32>,
    /// The matrix's sum of squares.
    pub squares: f64,
    /// Frobenius norm of what these triplets leave.
    pub residual: f64,
    /// With [`Rank::Noise`], the value that the others had to exceed.
    pub floor: Option<f64>,
}

/// Singular triplets with vectors in f64, as [`Triplets`] otherwise.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Exact {
    /// Left vectors, `rows x rank`, row by row.
    pub u: Vec<f64>,
    /// Singular values, descending.
    pub s: Vec<f64>,
    /// Right vectors, `columns x rank`, row by row.
    pub v: Vec<f64>,
    /// The matrix's sum of squares.
    pub squares: f64,
}

impl Exact {
    /// The same with vectors in f32.
    pub fn round(self) -> Triplets {
        let single = |x: Vec<f64>| x.into_iter().map(|x| x as f32).collect();
        Triplets {
            rank: self.s.len(),
            residual: rsvd::residual(self.squares, &self.s),
            u: single(self.u),
            v: single(self.v),
            s: self.s,
            squares: self.squares,
            floor: None,
        }
    }
}
