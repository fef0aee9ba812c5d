//! The methods that look at their models before they combine them: what a plan says of one, and what is kept of it while a run lasts.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::bf16::Work;
use crate::operand::{Source, Term};
use crate::store::map::Pool;
use crate::stream::Control;
use crate::{Error, Result};

use super::gram::Gram;
use super::linear::blame_input;
use super::mask::Mask;
use super::prepare::{Job, TensorPlan};
use super::spectral::Spectral;

/// How the models of a tensor are merged. Models come in the order of the terms, whose coefficients are their weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum MethodPlan {
    /// The sum of the terms, as without a method.
    Linear {},
    /// Spherical interpolation of two points.
    Slerp {
        /// From the first (0) to the second (1).
        t: f64,
    },
    /// Spherical interpolation of two points, or of their differences from a base, by their weights.
    Nuslerp {
        /// Whether each row is a vector; else each column, unless `flatten`.
        #[serde(default)]
        row_wise: bool,
        /// Whether the tensor is one vector.
        #[serde(default = "yes")]
        flatten: bool,
    },
    /// A weighted mean on the sphere.
    Multislerp {
        /// Whether weights are divided by their sum.
        #[serde(default = "yes")]
        normalize_weights: bool,
        /// What counts as zero.
        #[serde(default = "eps")]
        eps: f64,
    },
    /// The Riemannian mean of directions, times the mean norm.
    Karcher {
        /// Steps at most.
        #[serde(default = "ten")]
        max_iter: usize,
        /// A step that is small enough to be the last.
        #[serde(default = "tolerance")]
        tol: f64,
    },
    /// The mean, drawn towards the base as far as the models disagree.
    ModelStock {
        /// Whether each row is a vector.
        #[serde(default)]
        filter_wise: bool,
        /// Products of two norms count as this much at least.
        #[serde(default)]
        floor: f64,
    },
    /// Trimmed by magnitude, then the sum of those that agree in sign.
    Ties {
        /// Share that is kept, model by model.
        density: Vec<f64>,
        /// Whether the sum is divided by the weights in it.
        #[serde(default = "yes")]
        normalize: bool,
        /// What the result is multiplied by.
        #[serde(default = "one")]
        lambda: f64,
    },
    /// Dropped at random and rescaled.
    Dare {
        /// Probability of being kept, model by model.
        density: Vec<f64>,
        /// The seed.
        #[serde(default)]
        seed: u64,
        /// What makes up for the loss.
        #[serde(default)]
        rescale: Rescale,
        /// Whether only those that agree in sign are added.
        #[serde(default)]
        consensus: bool,
        /// Whether the sum is divided by the weights in it.
        #[serde(default)]
        normalize: bool,
        /// What the result is multiplied by.
        #[serde(default = "one")]
        lambda: f64,
    },
    /// Dropped at random, more likely the smaller an element is within its row.
    Della {
        /// Mean probability of being kept, model by model.
        density: Vec<f64>,
        /// How far the probability strays from its mean, model by model.
        epsilon: Vec<f64>,
        /// The seed.
        #[serde(default)]
        seed: u64,
        /// What makes up for the loss.
        #[serde(default)]
        rescale: Rescale,
        /// Whether only those that agree in sign are added.
        #[serde(default = "yes")]
        consensus: bool,
        /// Whether the sum is divided by the weights in it.
        #[serde(default)]
        normalize: bool,
        /// What the result is multiplied by.
        #[serde(default = "one")]
        lambda: f64,
    },
    /// Without the largest and the smallest.
    Breadcrumbs {
        /// Share that is kept, model by model.
        density: Vec<f64>,
        /// Share of the largest that is dropped, model by model.
        gamma: Vec<f64>,
        /// Whether only those that agree in sign are added.
        #[serde(default)]
        consensus: bool,
        /// Whether the sum is divided by the weights in it.
        #[serde(default)]
        normalize: bool,
        /// What the result is multiplied by.
        #[serde(default = "one")]
        lambda: f64,
    },
    /// Where the models differ most, weighted by their own energy.
    Sce {
        /// Share of positions that is kept.
        #[serde(default = "one")]
        select_topk: f64,
        /// Where the mean squares of all models add up to less than this, all weigh the same.
        #[serde(default)]
        floor: f64,
        /// What the result is multiplied by.
        #[serde(default = "one")]
        lambda: f64,
    },
    /// What one model moved is kept whole, what several moved is averaged.
    Ram {
        /// Whether what one model moved is enlarged where it shares much with others.
        #[serde(default)]
        plus: bool,
        /// Differences up to this size do not count as moved.
        #[serde(default = "small")]
        epsilon: f64,
        /// How much is enlarged.
        #[serde(default = "tenth")]
        r: f64,
        /// Where enlarging stops.
        #[serde(default = "fifth")]
        alpha: f64,
    },
    /// From the first to the second model, but not where they are far apart.
    Nearswap {
        /// The distance within which the second model is taken.
        t: f64,
    },
    /// Only what matters most, by distance and by the divergence of rows.
    ArceeFusion {},
    /// The sum of the task vectors with all singular values at their mean.
    IsoC {
        /// What the result is multiplied by.
        #[serde(default = "one")]
        lambda: f64,
    },
    /// The same, with directions of each task in the place of the last ones of the sum.
    IsoCts {
        /// Share of the directions that are the sum's.
        #[serde(default = "common")]
        common: f64,
        /// What the result is multiplied by.
        #[serde(default = "one")]
        lambda: f64,
    },
    /// The first singular vectors of every task, made orthogonal to each other.
    TsvM {
        /// Share of the directions that each task gets; an equal one if nothing is said.
        #[serde(default)]
        rank: Option<f64>,
        /// What the result is multiplied by.
        #[serde(default = "one")]
        lambda: f64,
    },
    /// Each task vector truncated, and rescaled to the nuclear norm that it had.
    Star {
        /// Share of the nuclear norm that stays.
        #[serde(default = "eta")]
        eta: f64,
        /// Directions that stay, whatever their share.
        #[serde(default)]
        rank: Option<usize>,
        /// What the result is multiplied by.
        #[serde(default = "one")]
        lambda: f64,
    },
    /// The sum of the task vectors with small singular values raised.
    Boost {
        /// Values after those that make up this share of their sum are raised to the last of those.
        #[serde(default = "hundredth")]
        beta: f64,
        /// What the result is multiplied by.
        #[serde(default = "one")]
        lambda: f64,
    },
    /// Merged in the space that the task vectors side by side span.
    Knots {
        /// Share of each part that is kept, model by model.
        density: Vec<f64>,
        /// Whether only what agrees in sign is added.
        #[serde(default = "yes")]
        elect: bool,
        /// Whether the sum is divided by the weights in it.
        #[serde(default = "yes")]
        normalize: bool,
        /// What the result is multiplied by.
        #[serde(default = "one")]
        lambda: f64,
    },
}

/// What makes up for dropped elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Rescale {
    /// Nothing.
    None,
    /// Division by the probability of being kept.
    #[default]
    Density,
    /// The factor that restores the sum of magnitudes.
    L1,
}

fn yes() -> bool {
    true
}
fn eps() -> f64 {
    1e-8
}
fn ten() -> usize {
    10
}
fn tolerance() -> f64 {
    1e-5
}
fn one() -> f64 {
    1.0
}
fn small() -> f64 {
    1e-5
}
fn tenth() -> f64 {
    0.1
}
fn fifth() -> f64 {
    0.2
}
fn common() -> f64 {
    0.8
}
fn eta() -> f64 {
    0.4
}
fn hundredth() -> f64 {
    0.01
}

/// Whether a method adds to a base.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Base {
    Needed,
    Allowed,
    Refused,
}

impl MethodPlan {
    /// Its name in plans.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Linear {} => "linear",
            Self::Slerp { .. } => "slerp",
            Self::Nuslerp { .. } => "nuslerp",
            Self::Multislerp { .. } => "multislerp",
            Self::Karcher { .. } => "karcher",
            Self::ModelStock { .. } => "model_stock",
            Self::Ties { .. } => "ties",
            Self::Dare { .. } => "dare",
            Self::Della { .. } => "della",
            Self::Breadcrumbs { .. } => "breadcrumbs",
            Self::Sce { .. } => "sce",
            Self::Ram { .. } => "ram",
            Self::Nearswap { .. } => "nearswap",
            Self::ArceeFusion {} => "arcee_fusion",
            Self::IsoC { .. } => "iso_c",
            Self::IsoCts { .. } => "iso_cts",
            Self::TsvM { .. } => "tsv_m",
            Self::Star { .. } => "star",
            Self::Boost { .. } => "boost",
            Self::Knots { .. } => "knots",
        }
    }

    /// Whether it adds up what stays of task vectors, times weights.
    pub(super) fn weighs(&self) -> bool {
        matches!(self, Self::Ties { .. } | Self::Dare { .. } | Self::Della { .. } | Self::Breadcrumbs { .. })
    }

    fn base(&self) -> Base {
        match self {
            Self::Linear {} | Self::Nuslerp { .. } | Self::Multislerp { .. } => Base::Allowed,
            Self::Slerp { .. } | Self::Karcher { .. } | Self::Nearswap { .. } => Base::Refused,
            _ => Base::Needed,
        }
    }

    /// The fewest and the most models.
    fn models(&self) -> (usize, usize) {
        match self {
            Self::Slerp { .. } | Self::Nuslerp { .. } | Self::Nearswap { .. } => (2, 2),
            Self::ArceeFusion {} => (1, 1),
            Self::ModelStock { .. } => (2, 64),
            _ => (1, 64),
        }
    }

    /// Everything that can be wrong with a method whatever the tensors hold.
    fn problem(&self, models: usize, base: bool) -> Option<String> {
        let name = self.name();
        let (fewest, most) = self.models();
        if models < fewest || models > most {
            let wanted = if fewest == most { format!("{fewest}") } else { format!("{fewest} to {most}") };
            return Some(format!("{name} merges {wanted} models, the plan has {models}"));
        }
        match self.base() {
            Base::Needed if !base => return Some(format!("{name} needs a base model, the plan has none")),
            Base::Refused if base => return Some(format!("{name} has no base model, the plan gives one")),
            _ => {}
        }
        let lists: &[(&str, &[f64])] = match self {
            Self::Ties { density, .. } | Self::Dare { density, .. } => &[("density", density)],
            Self::Della { density, epsilon, .. } => &[("density", density), ("epsilon", epsilon)],
            Self::Breadcrumbs { density, gamma, .. } => &[("density", density), ("gamma", gamma)],
            Self::Knots { density, .. } => &[("density", density)],
            _ => &[],
        };
        for (what, list) in lists {
            if list.len() != models {
                return Some(format!("{name} has {} numbers for {what}, but {models} models", list.len()));
            }
            if let Some(x) = list.iter().find(|x| !(0.0..=1.0).contains(*x)) {
                return Some(format!("{name}: {what} is {x}, it is a share from 0 to 1"));
            }
        }
        let shares = match self {
            Self::Sce { select_topk, .. } => Some(("select_topk", *select_topk)),
            Self::IsoCts { common, .. } => Some(("common", *common)),
            Self::Star { eta, .. } => Some(("eta", *eta)),
            Self::Boost { beta, .. } => Some(("beta", *beta)),
            Self::TsvM { rank: Some(rank), .. } => Some(("rank", *rank)),
            _ => None,
        };
        if let Some((what, x)) = shares.filter(|(_, x)| !(0.0..=1.0).contains(x)) {
            return Some(format!("{name}: {what} is {x}, it is a share from 0 to 1"));
        }
        let numbers: &[(&str, f64)] = match self {
            Self::Slerp { t } | Self::Nearswap { t } => &[("t", *t)],
            Self::Multislerp { eps, .. } => &[("eps", *eps)],
            Self::Karcher { tol, .. } => &[("tol", *tol)],
            Self::Ties { lambda, .. }
            | Self::Dare { lambda, .. }
            | Self::Della { lambda, .. }
            | Self::Breadcrumbs { lambda, .. }
            | Self::IsoC { lambda }
            | Self::IsoCts { lambda, .. }
            | Self::TsvM { lambda, .. }
            | Self::Star { lambda, .. }
            | Self::Boost { lambda, .. }
            | Self::Knots { lambda, .. } => &[("lambda", *lambda)],
            Self::ModelStock { floor, .. } => &[("floor", *floor)],
            Self::Sce { lambda, floor, .. } => &[("lambda", *lambda), ("floor", *floor)],
            Self::Ram { epsilon, r, alpha, .. } => &[("epsilon", *epsilon), ("r", *r), ("alpha", *alpha)],
            _ => &[],
        };
        if let Some((what, x)) = numbers.iter().find(|(_, x)| !x.is_finite()) {
            return Some(format!("{name}: {what} is {x}, it must be a finite number"));
        }
        if let Self::Nearswap { t } = self
            && *t < 0.0
        {
            return Some(format!("{name}: t is {t}, it is a distance"));
        }
        if let Self::TsvM { rank: Some(rank), .. } = self
            && *rank * models as f64 > 1.0 + 1e-9
        {
            return Some(format!(
                "{name}: rank is {rank} for each of {models} models, together more than the matrix has; it is at most 1 / {models}"
            ));
        }
        if let Self::Star { rank: Some(0), .. } = self {
            return Some(format!("{name}: rank is 0, at least one direction has to stay"));
        }
        None
    }
}

/// A method at work on one tensor.
#[derive(Debug)]
pub(super) enum Method {
    /// Coefficients from a Gram matrix.
    Gram(Gram),
    /// Masks.
    Mask(Box<Mask>),
    /// Singular vectors.
    Spectral(Box<Spectral>),
}

/// A tensor as methods see it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape<'a> {
    pub(super) name: &'a str,
    pub(super) dims: &'a [u64],
    pub(super) elements: u64,
    pub(super) double: bool,
}

impl Shape<'_> {
    /// Elements of a row: of the last dimension; everything, where there are fewer than two.
    pub(super) fn row(&self) -> u64 {
        match self.dims {
            [_, .., last] if *last > 0 => *last,
            _ => self.elements.max(1),
        }
    }
}

impl Method {
    /// The method of a tensor, checked; `None` where the plan has none.
    pub(super) fn prepare(plan: &TensorPlan, terms: &[Term], elements: u64, double: bool) -> Result<Option<Self>> {
        let Some(method) = &plan.method else { return Ok(None) };
        if *method == (MethodPlan::Linear {}) {
            return Ok(None);
        }
        if let Some(problem) = method.problem(terms.len(), plan.target.is_some()) {
            return Err(Error::mismatch(&plan.name, problem));
        }
        for term in terms {
            if !term.coefficient.is_finite() {
                return Err(Error::mismatch(&plan.name, format!("a weight is {}", term.coefficient)));
            }
            let vector = |s: &&Source| matches!(s, Source::Difference(..) | Source::Stored(_));
            if term.substitute.is_some() || term.sources().iter().any(vector) {
                let problem = format!("{} merges models, the plan gives it a vector", method.name());
                return Err(Error::mismatch(&plan.name, problem));
            }
        }
        let weights: Vec<f64> = terms.iter().map(|t| t.coefficient).collect();
        let shape = Shape { name: &plan.name, dims: &plan.shape, elements, double };
        if let Some(spectral) = Spectral::new(method, &weights, shape)? {
            return Ok(Some(Self::Spectral(Box::new(spectral))));
        }
        Ok(Some(match Gram::new(method, &weights, shape)? {
            Some(gram) => Self::Gram(gram),
            None => Self::Mask(Box::new(Mask::new(method, weights, shape)?)),
        }))
    }

    /// Stages before the combining one.
    pub(super) fn measures(&self) -> usize {
        match self {
            Self::Gram(_) => 1,
            Self::Mask(m) => m.measures(),
            Self::Spectral(s) => s.measures(),
        }
    }

    /// Of those, the ones that read all there is, as far as one can know beforehand.
    pub(super) fn readings(&self) -> u64 {
        match self {
            Self::Gram(_) => 1,
            Self::Mask(m) => m.readings(),
            Self::Spectral(s) => s.readings(),
        }
    }

    /// Whether a stage has nothing to do, which is known when the stage before has ended.
    pub(super) fn skips(&self, stage: usize) -> bool {
        match self {
            Self::Gram(_) | Self::Spectral(_) => false,
            Self::Mask(m) => m.skips(stage),
        }
    }

    /// Called once, when the last tile of a measuring stage is through.
    pub(super) fn solve(&self, stage: usize, control: &Control) -> Result<()> {
        match self {
            Self::Gram(g) => g.solve(control),
            Self::Mask(m) => m.solve(stage),
            Self::Spectral(_) => Ok(()),
        }
    }

    /// What can make the output in a measuring stage, see [`Mask::foresee`].
    pub(super) fn foresight(&self, stage: usize) -> Option<&Mask> {
        match self {
            Self::Mask(m) => Some(&**m).filter(|m| m.may_foresee(stage)),
            Self::Gram(_) | Self::Spectral(_) => None,
        }
    }

    /// How many blocks are to be made again, once what was expected can be compared with what was found.
    pub(super) fn look_back(&self) -> Option<u64> {
        match self {
            Self::Mask(m) => m.look_back(),
            Self::Gram(_) | Self::Spectral(_) => None,
        }
    }

    /// Whether a block's output has been made in a measuring stage, and is right.
    pub(super) fn stands(&self, block: u64) -> bool {
        matches!(self, Self::Mask(m) if m.stands(block))
    }

    /// Bytes that all workers together hold for the tensor while it lasts.
    pub(super) fn shared_memory(&self) -> u64 {
        match self {
            Self::Gram(g) => g.shared_memory(),
            Self::Mask(m) => m.shared_memory(),
            Self::Spectral(s) => s.shared_memory(),
        }
    }

    /// Bytes of a worker besides windows.
    pub(super) fn memory(&self) -> u64 {
        match self {
            Self::Gram(g) => g.memory(),
            Self::Mask(m) => m.memory(),
            Self::Spectral(s) => s.memory(),
        }
    }

    /// Wakes whoever waits for a block that will not come.
    pub(super) fn give_up(&self) {
        match self {
            Self::Gram(g) => g.give_up(),
            Self::Mask(m) => m.give_up(),
            // Nobody waits for a block of another.
            Self::Spectral(_) => {}
        }
    }
}

/// What a worker needs besides the tile.
#[derive(Debug, Clone, Copy)]
pub(super) struct Worker<'a> {
    pub(super) level: crate::simd::Level,
    pub(super) control: &'a Control,
    pub(super) pool: &'a Pool,
    pub(super) allow_nonfinite: bool,
    /// Threads that it may start for work in memory, itself included.
    pub(super) threads: usize,
}

impl Worker<'_> {
    /// Refuses inputs that are not finite, before they get into a sum over the tensor.
    pub(super) fn check<W: Work>(&self, job: &Job, finite: bool, elements: &Range<u64>) -> Result<()> {
        if finite || self.allow_nonfinite {
            return Ok(());
        }
        Err(blame_input::<W>(job, self.level, elements.clone(), self.pool))
    }
}
