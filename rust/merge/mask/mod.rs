//! The mask family: thresholds, ranks or random numbers choose elements, and what is chosen is added.
//!
//! The inputs are `d_i = x_i - base`, in the work type. Most methods share two parts: a choice for every model, and [`combine::consensus`]. What a choice
//! needs to know of the whole tensor is measured before: exact thresholds by [`crate::select`], sums in the order of
//! [`kernel::dot`](crate::simd::kernel::dot). Random choices are a function of seed, tensor name, model index and element index.

mod combine;
mod foresight;
mod rows;
mod search;
mod sums;

use std::ops::Range;
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::bf16::Work;
use crate::philox::{Philox, splitmix64};
use crate::select::{Order, Search, Tally, passes};
use crate::simd::dispatch::{self, MICRO};
use crate::stream::{BLOCK, Tile};
use crate::{Error, Result};

use super::gram::runs;
use super::method::{MethodPlan, Rescale, Shape, Worker};
use super::points::{Lanes, Points};
use super::prepare::Job;
use super::rows::Ranks;

/// The stream number that keeps random masks apart from other uses of a seed.
const MASK: u64 = 3;
/// What a method does with its inputs.
#[derive(Debug)]
enum Rule {
    /// A choice for each model, then [`combine::consensus`].
    Chosen { choices: Vec<Choice>, agreement: Agreement },
    /// Select, calculate, erase (arXiv 2408.07990, section 3.2). With `mean = (d_1 + d_2 + ...) / n` and the spread `(d_1 - mean)^2 + (d_2 - mean)^2 + ...`, all in the
    /// work type, the positions of the `int(share * those not zero)` largest spreads are selected; `w_i` is the sum of `d_i^2` over them, divided by the sum of those
    /// sums in f64; only what has the sign of `d_1 + d_2 + ...` counts in their weighted mean.
    /// Where the sums are less than `floor` on average per element, together, the weights are equal.
    Sce { agreement: Agreement, floor: f64 },
    /// arXiv 2601.13572. The sum of the `d_i` above `epsilon`, in order, over the number that moved; what one model moved alone is first multiplied by
    /// `1 + r * clip(shared_i / alone_i, 0, alpha)` (f64, rounded once) with `plus`.
    Ram { plus: bool, epsilon: f64, r: f64, alpha: f64 },
    /// `b` where `|b - a| <= t`, else `a + t` or `a - t`, towards `b`.
    Nearswap { t: f64 },
    /// The elements of the one input whose importance, `|d|` times the divergence of the row (f64, rounded once), is at least the median plus one and a
    /// half times the distance of the quartiles (f64, linear between neighbours).
    Fusion,
}

/// Which elements of an input stay.
#[derive(Debug)]
enum Choice {
    /// Every element.
    All,
    /// The largest, by the search of this number.
    Largest(usize),
    /// The largest but for the very largest, by two searches.
    Between(usize, usize),
    /// Each with a probability (as a bound on a random word), and what it is multiplied by.
    Random { generator: Philox, bound: u64, scale: f64 },
    /// Each with a probability that follows from its rank in its row.
    Ranked { generator: Philox, density: f64, epsilon: f64, divide: bool },
}

/// How what stays is added up.
#[derive(Debug, Clone, Copy)]
struct Agreement {
    elect: bool,
    normalize: bool,
    lambda: f64,
}

/// What a measuring stage does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// The divergence of every row, and what [`Stage::Search`] does.
    Rows,
    /// A sample, and a pass of every search.
    Search,
    /// A further pass of the searches that have no answer yet.
    Refine,
    /// Sums over what was chosen.
    Sums,
}

/// A method at work on one tensor.
#[derive(Debug)]
pub(super) struct Mask {
    rule: Rule,
    weights: Vec<f64>,
    elements: u64,
    row: u64,
    double: bool,
    stages: Vec<Stage>,
    searches: Vec<Search>,
    /// Which input a search is over.
    over: Vec<usize>,
    order: Order,
    /// Blocks whose foreseen output is not what it should be, once that is known.
    mistaken: OnceLock<Vec<Range<u64>>>,
    sampling: Mutex<()>,
    /// Sums of each block.
    sums: Mutex<Vec<Vec<f64>>>,
    /// Scales, weights or factors of each model, once the sums are known.
    solved: OnceLock<Vec<f64>>,
    divergences: Mutex<Vec<f64>>,
    diverged: OnceLock<Vec<f64>>,
    /// The key from which on importances stay.
    fence: OnceLock<u64>,
}

/// The buffers of a worker.
#[derive(Debug, Default)]
pub(super) struct Scratch<W> {
    pub(super) lanes: Lanes<W>,
    tallies: Vec<Tally>,
    words: [Vec<u32>; 2],
    lasts: Vec<u32>,
    bounds: Vec<Bound>,
    /// What the rows that a block has a part in leave of each input, and where the block begins in them.
    chosen: Vec<Vec<W>>,
    chosen_from: usize,
    ranks: Ranks,
    terms: Terms<W>,
}

/// For each rank in a row the last word with which it stays, and what it is divided by; zero if it never stays.
#[derive(Debug, Default)]
struct Terms<W> {
    /// The row's length, density, epsilon, and whether something is divided.
    of: (u64, f64, f64, bool),
    each: Vec<(u32, W)>,
}

impl<W: Work> Terms<W> {
    /// Makes the terms of rows, unless they are made.
    fn fit(&mut self, of: (u64, f64, f64, bool)) -> &[(u32, W)] {
        let (row, density, epsilon, divide) = of;
        if self.of != of {
            let last = (row.max(2) - 1) as f64;
            self.of = of;
            self.each.clear();
            self.each.extend((0..row).map(|rank| {
                let p = if row == 1 { density } else { (density + epsilon) - (2.0 * epsilon) * (rank as f64 / last) };
                let p = p.clamp(0.0, 1.0);
                match word_bound(p) {
                    0 => (0, W::ZERO),
                    bound => ((bound - 1) as u32, if divide { W::from_f64(p) } else { W::from_f64(1.0) }),
                }
            }));
        }
        &self.each
    }
}

/// Up to some index elements of a magnitude stay that do not after it.
#[derive(Debug, Clone, Copy)]
struct Bound {
    key: u64,
    at: u64,
}

impl Bound {
    /// Splits some elements where the bound changes: the smallest key that is taken before and after, and where.
    fn split(self, elements: &Range<u64>) -> (usize, u64, u64) {
        let at = self.at.clamp(elements.start, elements.end) - elements.start;
        (at as usize, self.key, self.key.saturating_add(1))
    }
}

/// The generator of a model's mask.
fn generator(seed: u64, name: &str, model: usize) -> Philox {
    Philox::new(seed ^ splitmix64(model as u64 + 1), name, MASK)
}

/// A random word is below this with the probability.
fn word_bound(probability: f64) -> u64 {
    (probability.clamp(0.0, 1.0) * 4_294_967_296.0).floor() as u64
}

impl Mask {
    /// The method, which is one of this family.
    pub(super) fn new(plan: &MethodPlan, weights: Vec<f64>, shape: Shape<'_>) -> Result<Self> {
        let n = shape.elements;
        let count = |share: f64| if share >= 1.0 { n } else { (share * n as f64) as u64 };
        let (mut searches, mut over) = (Vec::new(), Vec::new());
        let mut search = |wanted: u64, input: usize| {
            searches.push(Search::new(wanted, n));
            over.push(input);
            searches.len() - 1
        };
        let mut stages = Vec::new();
        let rule = match plan {
            MethodPlan::Ties { density, normalize, lambda } => {
                let choices = density.iter().enumerate().map(|(i, &d)| Choice::Largest(search(count(d), i))).collect();
                let agreement = Agreement { elect: true, normalize: *normalize, lambda: *lambda };
                Rule::Chosen { choices, agreement }
            }
            MethodPlan::Breadcrumbs { density, gamma, consensus, normalize, lambda } => {
                let choices = density.iter().zip(gamma).enumerate().map(|(i, (&d, &g))| {
                    let kept = count(d);
                    let most = ((g * n as f64) as u64).min(n - kept);
                    Choice::Between(search(most + kept, i), search(most, i))
                });
                let choices = choices.collect();
                let agreement = Agreement { elect: *consensus, normalize: *normalize, lambda: *lambda };
                Rule::Chosen { choices, agreement }
            }
            MethodPlan::Dare { density, seed, rescale, consensus, normalize, lambda } => {
                let choice = |(i, &d): (usize, &f64)| {
                    if d >= 1.0 {
                        return Choice::All;
                    }
                    // Of a density of 0 nothing stays, so nothing is rescaled.
                    let scale = if *rescale == Rescale::Density && d > 0.0 { 1.0 / d } else { 1.0 };
                    Choice::Random { generator: generator(*seed, shape.name, i), bound: word_bound(d), scale }
                };
                if *rescale == Rescale::L1 && density.iter().any(|&d| d < 1.0) {
                    stages.push(Stage::Sums);
                }
                let agreement = Agreement { elect: *consensus, normalize: *normalize, lambda: *lambda };
                Rule::Chosen { choices: density.iter().enumerate().map(choice).collect(), agreement }
            }
            MethodPlan::Della { density, epsilon, seed, rescale, consensus, normalize, lambda } => {
                let choice = |(i, (&density, &epsilon)): (usize, (&f64, &f64))| {
                    if density >= 1.0 {
                        return Choice::All;
                    }
                    let divide = *rescale == Rescale::Density;
                    Choice::Ranked { generator: generator(*seed, shape.name, i), density, epsilon, divide }
                };
                if *rescale == Rescale::L1 && density.iter().any(|&d| d < 1.0) {
                    stages.push(Stage::Sums);
                }
                let agreement = Agreement { elect: *consensus, normalize: *normalize, lambda: *lambda };
                Rule::Chosen { choices: density.iter().zip(epsilon).enumerate().map(choice).collect(), agreement }
            }
            MethodPlan::Sce { select_topk, lambda, floor } => {
                if *select_topk < 1.0 {
                    searches.push(Search::of_nonzero(*select_topk, n));
                    over.push(0);
                }
                let agreement = Agreement { elect: true, normalize: true, lambda: *lambda };
                Rule::Sce { agreement, floor: *floor }
            }
            MethodPlan::Ram { plus, epsilon, r, alpha } => {
                if *plus {
                    stages.push(Stage::Sums);
                }
                Rule::Ram { plus: *plus, epsilon: *epsilon, r: *r, alpha: *alpha }
            }
            MethodPlan::Nearswap { t } => Rule::Nearswap { t: *t },
            MethodPlan::ArceeFusion {} => {
                if n > 0 {
                    for q in [0.25, 0.5, 0.75] {
                        let low = (q * (n - 1) as f64) as u64;
                        for rank in [low, (low + 1).min(n - 1)] {
                            searches.push(Search::exact(n - rank, n));
                            over.push(0);
                        }
                    }
                }
                Rule::Fusion
            }
            other => {
                let problem = format!("{} is not of the mask family; please report this", other.name());
                return Err(Error::mismatch(shape.name, problem));
            }
        };
        if searches.iter().any(|s| s.found().is_none()) {
            stages.push(if matches!(rule, Rule::Fusion) { Stage::Rows } else { Stage::Search });
            if n > crate::select::SAMPLE {
                stages.extend(std::iter::repeat_n(Stage::Refine, passes(shape.double) - 1));
            }
        }
        if matches!(rule, Rule::Sce { .. }) {
            stages.push(Stage::Sums);
        }
        let order = Order::new(searches.len());
        let mask = Self {
            rule,
            weights,
            elements: n,
            row: shape.row(),
            double: shape.double,
            stages,
            searches,
            over,
            order,
            mistaken: OnceLock::new(),
            sampling: Mutex::default(),
            sums: Mutex::default(),
            solved: OnceLock::new(),
            divergences: Mutex::default(),
            diverged: OnceLock::new(),
            fence: OnceLock::new(),
        };
        if mask.ranks() && mask.row > 1 << 31 {
            return Err(Error::mismatch(
                shape.name,
                format!("rows of {} elements are too long to be ranked", mask.row),
            ));
        }
        if !mask.stages.contains(&Stage::Sums) {
            mask.solve_sums(&[]);
        }
        mask.note_cuts();
        Ok(mask)
    }

    pub(super) fn measures(&self) -> usize {
        self.stages.len()
    }

    pub(super) fn readings(&self) -> u64 {
        self.stages.iter().filter(|s| **s != Stage::Refine).count() as u64
    }

    pub(super) fn skips(&self, stage: usize) -> bool {
        self.stages[stage] == Stage::Refine && self.searches.iter().all(|s| s.found().is_some())
    }

    pub(super) fn shared_memory(&self) -> u64 {
        let blocks = self.elements.div_ceil(BLOCK);
        let searches = if self.elements > crate::select::SAMPLE { self.searches.len() as u64 } else { 0 };
        let sums = if self.stages.contains(&Stage::Sums) { blocks * (16 * self.weights.len() as u64 + 24) } else { 0 };
        let rows = if matches!(self.rule, Rule::Fusion) { 8 * self.elements.div_ceil(self.row) } else { 0 };
        searches * Search::memory(self.elements) + sums + rows
    }

    pub(super) fn memory(&self) -> u64 {
        let work = if self.double { 8 } else { 4 };
        let inputs = self.weights.len() as u64;
        let sample = if self.searches.is_empty() { 0 } else { crate::select::SAMPLE * work * (inputs + 1) };
        let rows = match self.rule {
            _ if self.ranks() => {
                // The window of a block with the whole of its first and last rows, read once more, and their ranks.
                let wide = BLOCK + 2 * self.row;
                wide * (work + work * inputs) + self.row * 2 * work + Ranks::memory(self.row)
            }
            // Of a row in the sample, and of one that is measured.
            Rule::Fusion => (2 * self.row + BLOCK) * 2 * work,
            _ => 0,
        };
        sample + rows + self.searches.len() as u64 * size_of::<Tally>() as u64 + MICRO as u64 * 12
    }

    pub(super) fn give_up(&self) {
        self.order.give_up();
    }

    fn ranks(&self) -> bool {
        matches!(&self.rule, Rule::Chosen { choices, .. } if choices.iter().any(|c| matches!(c, Choice::Ranked { .. })))
    }

    /// Takes in a tile of a measuring stage.
    pub(super) fn measure<W: Work>(
        &self,
        stage: usize,
        worker: Worker<'_>,
        job: &Job,
        tile: &Tile,
        scratch: &mut Scratch<W>,
    ) -> Result<()> {
        scratch.fit(self);
        match self.stages[stage] {
            Stage::Rows => {
                self.sample(worker, job, scratch)?;
                self.measure_rows(worker, job, tile, scratch)
            }
            Stage::Search => {
                self.sample(worker, job, scratch)?;
                self.count(worker, job, tile, scratch)
            }
            Stage::Refine => self.count(worker, job, tile, scratch),
            Stage::Sums => self.sum(worker, job, tile, scratch),
        }
    }

    /// Ends a measuring stage.
    pub(super) fn solve(&self, stage: usize) -> Result<()> {
        if self.stages[stage] == Stage::Rows {
            let found = std::mem::take(&mut *self.divergences.lock().unwrap_or_else(PoisonError::into_inner));
            let _ = self.diverged.set(found);
        }
        match self.stages[stage] {
            Stage::Rows | Stage::Search | Stage::Refine => {
                for search in &self.searches {
                    if self.double { search.end_pass::<f64>() } else { search.end_pass::<f32>() }
                }
                self.note_cuts();
                let last = self.stages.get(stage + 1) != Some(&Stage::Refine);
                if last && self.searches.iter().any(|s| s.found().is_none()) {
                    return Err(Error::Usage("a threshold was not found in time; please report this".into()));
                }
            }
            Stage::Sums => {
                let blocks = std::mem::take(&mut *self.sums.lock().unwrap_or_else(PoisonError::into_inner));
                let mut sums = vec![0.0; blocks.first().map_or(0, Vec::len)];
                for block in &blocks {
                    sums.iter_mut().zip(block).for_each(|(sum, x)| *sum += x);
                }
                self.solve_sums(&sums);
            }
        }
        Ok(())
    }

    /// Reads the inputs of some elements, and makes what searches look at, from place `at` of the buffers on. Whether all inputs are finite.
    fn values<W: Work>(
        &self,
        points: &mut Points<'_, '_, W>,
        lanes: &mut Lanes<W>,
        at: usize,
        elements: &Range<u64>,
    ) -> Result<bool> {
        let here = at..at + (elements.end - elements.start) as usize;
        let level = points.level;
        let Lanes { base, inputs, more, .. } = lanes;
        let inputs = &mut inputs[..self.weights.len()];
        let mut finite = true;
        for (i, input) in inputs.iter_mut().enumerate() {
            finite &= points.input(i, &mut input[here.clone()], &mut base[here.clone()], elements)?;
        }
        let [first, ..] = more;
        match &self.rule {
            Rule::Sce { .. } if !self.searches.is_empty() => {
                // How far the inputs are from their mean.
                dispatch::spread(level, &mut first[here.clone()], inputs, here.start);
            }
            Rule::Fusion => {
                let found = self.diverged.get().map_or(&[][..], Vec::as_slice);
                let first = &mut first[here.clone()];
                for (column, part) in runs(elements, self.row) {
                    let number = (elements.start + part.start as u64 - column as u64) / self.row;
                    let c = found.get(number as usize).copied().unwrap_or(0.0);
                    dispatch::weigh(level, &mut first[part.clone()], &inputs[0][here.clone()][part], c);
                }
            }
            _ => {}
        }
        Ok(finite)
    }

    /// What a search over an input looks at.
    fn stream<'l, W>(&self, lanes: &'l Lanes<W>, input: usize) -> &'l [W] {
        match self.rule {
            Rule::Sce { .. } | Rule::Fusion => &lanes.more[0],
            _ => &lanes.inputs[input],
        }
    }

    /// What must be known of a block before its first element: where thresholds cut, and what its rows leave.
    fn begin<W: Work>(
        &self,
        worker: Worker<'_>,
        job: &Job,
        points: &mut Points<'_, '_, W>,
        block: Range<u64>,
        scratch: &mut Scratch<W>,
    ) -> Result<()> {
        scratch.bounds.clear();
        if !matches!(self.rule, Rule::Fusion) {
            self.find_cuts(worker, points, &block, scratch)?;
        }
        if self.ranks() {
            self.choose_ranked(worker, job, points, &block, scratch)?;
        }
        Ok(())
    }
}

impl<W: Work> Scratch<W> {
    fn fit(&mut self, mask: &Mask) {
        self.lanes.fit(mask.weights.len());
        self.tallies.resize_with(mask.searches.len().max(self.tallies.len()), Tally::default);
        self.words.iter_mut().for_each(|words| words.resize(MICRO + 4, 0));
        self.lasts.resize(MICRO, 0);
        self.chosen.resize_with(mask.weights.len().max(self.chosen.len()), Vec::new);
    }
}
