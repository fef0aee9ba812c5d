//! What a caller asks of a matrix, as data.

use serde::{Deserialize, Serialize};

use super::{Exact, Matrix, Rank, Triplets, gram, rsvd};
use crate::Result;
use crate::operand::Term;
use crate::plan::{Operands, Settings, TermPlan, elements, noises, scale_noise};
use crate::stream::Control;

/// A matrix of an expression.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MatrixPlan {
    /// The tensor's name.
    pub name: String,
    /// Its shape: `[m, n]`, or `[E, m, n]` with a number.
    pub shape: Vec<u64>,
    /// Which matrix of a stack.
    #[serde(default)]
    pub number: Option<u64>,
    /// What is summed.
    pub terms: Vec<TermPlan>,
}

/// Which triplets of a matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Which {
    /// The largest.
    Top,
    /// The smallest.
    Bottom,
}

/// Triplets of a matrix.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SvdPlan {
    /// The matrix.
    #[serde(flatten)]
    pub matrix: MatrixPlan,
    /// How many; of the smallest a fixed number.
    pub rank: Rank,
    /// Which.
    pub which: Which,
    /// For the test matrix.
    pub seed: u64,
    /// How to run.
    pub settings: Settings,
}

/// Singular values of a matrix.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SpectrumPlan {
    /// The matrix.
    #[serde(flatten)]
    pub matrix: MatrixPlan,
    /// How many of the largest; all if nothing is said.
    #[serde(default)]
    pub count: Option<usize>,
    /// Whether to find the noise floor.
    pub floor: bool,
    /// For the test matrix and the signs.
    pub seed: u64,
    /// How to run.
    pub settings: Settings,
}

/// What was found of a spectrum.
#[derive(Debug, Clone, Serialize)]
pub struct Spectrum {
    /// Singular values, descending.
    pub values: Vec<f64>,
    /// Sum of squares of the matrix.
    pub squares: f64,
    /// The largest singular value with random signs.
    pub floor: Option<f64>,
}

impl MatrixPlan {
    /// Its terms, opened; random controls get their scales.
    fn terms(&self, operands: Operands<'_>, settings: &Settings, control: &Control) -> Result<Vec<Term>> {
        let count = elements(&self.shape, &self.name)?;
        let mut terms: Vec<Term> =
            self.terms.iter().map(|t| operands.term(t, &self.name, count)).collect::<Result<_>>()?;
        terms.retain(|t| !t.is_zero());
        let double = terms.iter().any(Term::is_double);
        scale_noise(noises(&self.name, count, double, &mut terms), true, settings, control)?;
        Ok(terms)
    }

    fn matrix<'a>(&'a self, terms: &'a [Term]) -> Result<Matrix<'a>> {
        match self.number {
            None => Matrix::new(&self.name, &self.shape, terms),
            Some(number) => Matrix::of_stack(&self.name, &self.shape, number, terms),
        }
    }
}

/// Triplets of a matrix of so many rows and columns.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MemoryPlan {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub columns: usize,
    /// How many.
    pub rank: Rank,
    /// Which.
    pub which: Which,
    /// How to run.
    pub settings: Settings,
}

/// Bytes of anonymous memory that [`svd`] takes beside what the process has: with a rule instead of a number, at least and at most.
pub fn memory(plan: &MemoryPlan) -> [u64; 2] {
    match (plan.which, plan.rank) {
        (Which::Bottom, Rank::Fixed(r)) => [gram::memory(plan.rows, plan.columns, Some(r), plan.settings.threads()); 2],
        (_, rank) => rsvd::memory(plan.rows, plan.columns, rank, &plan.settings),
    }
}

/// The triplets that a plan asks for, and the matrix's rows and columns.
///
/// # Errors
/// As [`rsvd::top`] and [`gram::bottom`]; [`crate::Error::Mismatch`] for terms that do not fit, [`crate::Error::Usage`] for the smallest by any rule but a
/// number.
pub fn svd(plan: &SvdPlan, operands: Operands<'_>, control: &Control) -> Result<([usize; 2], Triplets)> {
    let terms = plan.matrix.terms(operands, &plan.settings, control)?;
    let matrix = plan.matrix.matrix(&terms)?;
    let found = match (plan.which, plan.rank) {
        (Which::Top, rank) => rsvd::top(&matrix, rank, plan.seed, &plan.settings, control)?,
        (Which::Bottom, Rank::Fixed(r)) => gram::bottom(&matrix, r, &plan.settings, control)?,
        (Which::Bottom, _) => {
            return Err(crate::Error::Usage(
                "of the smallest triplets a number is wanted, not a share or a floor".into(),
            ));
        }
    };
    Ok(([matrix.rows, matrix.columns], found))
}

/// The smallest triplets that a plan asks for, with vectors in f64, and the matrix's rows and columns.
///
/// # Errors
/// As [`svd`].
pub fn svd_exact(plan: &SvdPlan, operands: Operands<'_>, control: &Control) -> Result<([usize; 2], Exact)> {
    let terms = plan.matrix.terms(operands, &plan.settings, control)?;
    let matrix = plan.matrix.matrix(&terms)?;
    match (plan.which, plan.rank) {
        (Which::Bottom, Rank::Fixed(r)) => {
            Ok(([matrix.rows, matrix.columns], gram::bottom_exact(&matrix, r, &plan.settings, control)?))
        }
        _ => Err(crate::Error::Usage("vectors in f64 come with the smallest triplets, by a number".into())),
    }
}

/// The spectrum that a plan asks for.
///
/// # Errors
/// As [`svd`].
pub fn spectrum(plan: &SpectrumPlan, operands: Operands<'_>, control: &Control) -> Result<Spectrum> {
    let terms = plan.matrix.terms(operands, &plan.settings, control)?;
    let matrix = plan.matrix.matrix(&terms)?;
    let floor = if plan.floor { Some(rsvd::floor(&matrix, plan.seed, &plan.settings, control)?) } else { None };
    let (values, squares) = match plan.count {
        Some(r) => {
            let found = rsvd::top(&matrix, Rank::Fixed(r), plan.seed, &plan.settings, control)?;
            (found.s, found.squares)
        }
        None => {
            let values = gram::spectrum(&matrix, &plan.settings, control)?;
            let squares: f64 = values.iter().map(|s| s * s).sum();
            if !squares.is_finite() {
                return Err(crate::Error::mismatch(matrix.name, "has a sum of squares that f64 does not hold"));
            }
            (values, squares)
        }
    };
    Ok(Spectrum { values, squares, floor })
}
