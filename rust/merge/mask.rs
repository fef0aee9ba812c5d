//! The mask family: thresholds, ranks or random numbers choose elements, and what is chosen is added.
//!
//! The inputs are `d_i = x_i - base`, in the work type. Most methods share two parts: a choice for every model, and [`consensus`]. What a choice
//! needs to know of the whole tensor is measured before: exact thresholds by [`crate::select`], sums in the order of
//! [`kernel::dot`](crate::simd::kernel::dot). Random choices are a function of seed, tensor name, model index and element index.

use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::bf16::Work;
use crate::philox::{Philox, splitmix64};
use crate::select::{Order, Pass, Search, Tally, magnitude, passes, places, top};
use crate::simd::Level;
use crate::simd::dispatch::{self, Band, Draw, MICRO, with_element};
use crate::stream::{BLOCK, Tile};
use crate::{Error, Result};

use super::gram::{micros, runs};
use super::method::{MethodPlan, Rescale, Shape, Worker};
use super::points::{Lanes, Opened, Points, Update};
use super::prepare::Job;
use super::rows::{Ranks, divergence};

/// The stream number that keeps random masks apart from other uses of a seed.
const MASK: u64 = 3;
/// Elements whose windows fit the second-level cache together, for what is read once.
const WINDOW: u64 = BLOCK / 8;
/// A sum of weights smaller than this divides nothing.
const TINY: f64 = 1e-8;

/// What a method does with its inputs.
#[derive(Debug)]
enum Rule {
    /// A choice for each model, then [`consensus`].
    Chosen { choices: Vec<Choice>, agreement: Agreement },
    /// Select, calculate, erase (arXiv 2408.07990, section 3.2). With `mean = (d_1 + d_2 + ...) / n` and the spread `(d_1 - mean)^2 + (d_2 - mean)^2 + ...`, all in the
    /// work type, the positions of the `int(share * those not zero)` largest spreads are selected; `w_i` is the sum of `d_i^2` over them, divided by the sum of those
    /// sums in f64; only what has the sign of `d_1 + d_2 + ...` counts in their weighted mean.
    Sce { agreement: Agreement },
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
    /// The divergence of every row.
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
    words: Vec<u32>,
    lasts: Vec<u32>,
    bounds: Vec<Bound>,
    /// What the rows that a block has a part in leave of each input, and where the block begins in them.
    chosen: Vec<Vec<W>>,
    chosen_from: usize,
    ranks: Ranks,
    /// For each rank the last word with which it stays, and what it is divided by; zero if it never stays.
    terms: Vec<(u32, W)>,
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
                    let scale = if *rescale == Rescale::Density { 1.0 / d } else { 1.0 };
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
            MethodPlan::Sce { select_topk, lambda } => {
                if *select_topk < 1.0 {
                    searches.push(Search::of_nonzero(*select_topk, n));
                    over.push(0);
                }
                Rule::Sce { agreement: Agreement { elect: true, normalize: true, lambda: *lambda } }
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
                        search(n - low, 0);
                        search(n - (low + 1).min(n - 1), 0);
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
            stages.push(Stage::Search);
            if n > crate::select::SAMPLE {
                stages.extend(std::iter::repeat_n(Stage::Refine, passes(shape.double) - 1));
            }
        }
        match rule {
            Rule::Sce { .. } => stages.push(Stage::Sums),
            Rule::Fusion => stages.insert(0, Stage::Rows),
            _ => {}
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
        searches * Search::memory() + sums + rows
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
            Rule::Fusion => self.row * 4 * 8 + BLOCK * 2 * work,
            _ => 0,
        };
        sample + rows + self.searches.len() as u64 * size_of::<Tally>() as u64 + MICRO as u64 * 8
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
            Stage::Rows => self.measure_rows::<W>(worker, job, tile),
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
        match self.stages[stage] {
            Stage::Rows => {
                let found = std::mem::take(&mut *self.divergences.lock().unwrap_or_else(PoisonError::into_inner));
                let _ = self.diverged.set(found);
            }
            Stage::Search | Stage::Refine => {
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

    /// Says where equals stop being taken, as far as that follows from the answers of the searches.
    fn note_cuts(&self) {
        if matches!(self.rule, Rule::Fusion) {
            self.note_fence();
            return;
        }
        for (i, search) in self.searches.iter().enumerate() {
            let Some(found) = search.found() else { continue };
            // Whether a zero is kept makes no difference, except to the number of positions that sce selects.
            let indifferent = found.key == 0 && matches!(self.rule, Rule::Chosen { .. });
            if found.take == found.equal || indifferent {
                self.order.set_cut(i, u64::MAX);
            } else if found.take == 0 {
                self.order.set_cut(i, 0);
            }
        }
    }

    /// Median and one and a half times the distance of the quartiles, once all are found: the smallest importance that stays.
    fn note_fence(&self) {
        let found: Option<Vec<u64>> = self.searches.iter().map(|s| s.found().map(|t| t.key)).collect();
        let Some(keys) = found.filter(|k| k.len() == 6) else { return };
        let value = |key: u64| {
            if self.double { f64::from_bits(key) } else { f64::from(f32::from_bits(key as u32)) }
        };
        let quantile = |i: usize, q: f64| {
            let p = q * (self.elements - 1) as f64;
            let (x, y) = (value(keys[2 * i]), value(keys[2 * i + 1]));
            x + (p - p.floor()) * (y - x)
        };
        let (first, median, third) = (quantile(0, 0.25), quantile(1, 0.5), quantile(2, 0.75));
        let fence = median + 1.5 * (third - first);
        // The smallest number of the work type that is not below it; importances are not negative.
        let key = if fence <= 0.0 {
            0
        } else if self.double {
            fence.to_bits()
        } else {
            let near = fence as f32;
            u64::from(near.to_bits()) + u64::from(f64::from(near) < fence)
        };
        let _ = self.fence.set(key);
    }

    /// What follows from the sums of the tensor for each model.
    fn solve_sums(&self, sums: &[f64]) {
        let models = 0..self.weights.len();
        let pair = |i: usize| (sums.get(2 * i).copied(), sums.get(2 * i + 1).copied());
        let solved = match &self.rule {
            Rule::Chosen { choices, .. } => {
                let scale = |i: usize| match (&choices[i], pair(i)) {
                    (Choice::Random { .. } | Choice::Ranked { .. }, (Some(all), Some(left))) if left > 0.0 => {
                        all / left
                    }
                    (Choice::Random { scale, .. }, (None, _)) => *scale,
                    _ => 1.0,
                };
                models.map(scale).collect()
            }
            Rule::Sce { .. } => {
                let total = sums.iter().fold(0.0, |sum, x| sum + x);
                sums.iter().map(|x| if total == 0.0 { 0.0 } else { x / total }).collect()
            }
            Rule::Ram { plus, r, alpha, .. } => {
                let factor = |i: usize| match pair(i) {
                    (Some(alone), Some(shared)) if *plus => {
                        let ratio = if alone > 0.0 { shared / alone } else { *alpha };
                        1.0 + r * ratio.max(0.0).min(*alpha)
                    }
                    _ => 1.0,
                };
                models.map(factor).collect()
            }
            Rule::Nearswap { .. } | Rule::Fusion => Vec::new(),
        };
        let _ = self.solved.set(solved);
    }

    /// Begins the searches with a sample, whoever needs it first.
    fn sample<W: Work>(&self, worker: Worker<'_>, job: &Job, scratch: &mut Scratch<W>) -> Result<()> {
        let _one = self.sampling.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.searches.iter().any(Search::wants_sample) {
            return Ok(());
        }
        let mut samples = vec![Vec::new(); self.weights.len()];
        for place in places(self.elements) {
            let mut opened = Opened::new(worker.level, job, &place, worker.pool)?;
            let mut points = opened.points();
            for elements in micros(place) {
                let finite = self.values(&mut points, &mut scratch.lanes, 0, &elements)?;
                worker.check::<W>(job, finite, &elements)?;
                let n = (elements.end - elements.start) as usize;
                for (i, sample) in samples.iter_mut().enumerate() {
                    sample.extend_from_slice(&self.stream(&scratch.lanes, i)[..n]);
                }
            }
        }
        for (i, (search, &input)) in self.searches.iter().zip(&self.over).enumerate() {
            search.begin(&samples[input]);
            if i > 0 && self.over[i - 1] == input {
                search.join(&self.searches[i - 1]);
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
        let Lanes { base, inputs, more } = lanes;
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

    /// A pass of every search that has one to make.
    fn count<W: Work>(&self, worker: Worker<'_>, job: &Job, tile: &Tile, scratch: &mut Scratch<W>) -> Result<()> {
        let mut passes: Vec<_> = self.searches.iter().map(Search::pass).collect();
        for i in 1..passes.len() {
            let known = |p: &Arc<Pass>| passes[..i].iter().flatten().any(|other| Arc::ptr_eq(p, other));
            if passes[i].as_ref().is_some_and(known) {
                passes[i] = None;
            }
        }
        if passes.iter().all(Option::is_none) {
            return Ok(());
        }
        let Range { start, end } = tile.elements;
        for at in (start..end).step_by(WINDOW as usize) {
            let window = at..(at + WINDOW).min(end);
            let mut opened = Opened::new(worker.level, job, &window, worker.pool)?;
            let mut points = opened.points();
            for elements in points.spans(&window) {
                let finite = self.values(&mut points, &mut scratch.lanes, 0, &elements)?;
                worker.check::<W>(job, finite, &elements)?;
                let n = (elements.end - elements.start) as usize;
                for ((pass, tally), &input) in passes.iter().zip(&mut scratch.tallies).zip(&self.over) {
                    if let Some(pass) = pass {
                        pass.count(worker.level, &self.stream(&scratch.lanes, input)[..n], tally);
                    }
                }
            }
        }
        for (pass, tally) in passes.iter().zip(&mut scratch.tallies) {
            if let Some(pass) = pass {
                pass.close(tally);
            }
        }
        Ok(())
    }

    /// The sums of every block of a tile.
    fn sum<W: Work>(&self, worker: Worker<'_>, job: &Job, tile: &Tile, scratch: &mut Scratch<W>) -> Result<()> {
        let models = self.weights.len();
        let mut opened = Opened::new(worker.level, job, &tile.elements, worker.pool)?;
        let mut points = opened.points();
        let ones = [W::from_f64(1.0); MICRO];
        for (block, range) in tile.blocks() {
            self.begin(worker, job, &mut points, range.clone(), scratch)?;
            let mut sums = vec![0.0; if matches!(self.rule, Rule::Sce { .. }) { models } else { 2 * models }];
            for elements in micros(range.clone()) {
                let n = (elements.end - elements.start) as usize;
                for part in points.spans(&elements) {
                    let at = (part.start - elements.start) as usize;
                    let finite = self.values(&mut points, &mut scratch.lanes, at, &part)?;
                    worker.check::<W>(job, finite, &part)?;
                    if matches!(self.rule, Rule::Sce { .. }) {
                        self.select(worker.level, scratch, at, &part);
                    }
                }
                match &self.rule {
                    Rule::Chosen { choices, .. } => {
                        for (i, choice) in choices.iter().enumerate() {
                            let total = |x: &[W], size: &mut [W]| {
                                dispatch::absolute(worker.level, size, x);
                                dispatch::dot(worker.level, size, &ones[..n])
                            };
                            let Lanes { inputs, more, .. } = &mut scratch.lanes;
                            let size = &mut more[2][..n];
                            let x = &mut inputs[i][..n];
                            match choice {
                                Choice::Random { generator, bound, .. } => {
                                    sums[2 * i] += total(x, size);
                                    let words = &mut scratch.words[..n];
                                    dispatch::words(worker.level, words, *generator, elements.start);
                                    dispatch::keep_random(worker.level, x, words, *bound, W::from_f64(1.0));
                                    sums[2 * i + 1] += total(x, size);
                                }
                                Choice::Ranked { .. } => {
                                    sums[2 * i] += total(x, size);
                                    let from = scratch.chosen_from + (elements.start - range.start) as usize;
                                    sums[2 * i + 1] += total(&scratch.chosen[i][from..from + n], size);
                                }
                                _ => {}
                            }
                        }
                    }
                    Rule::Sce { .. } => {
                        for (sum, input) in sums.iter_mut().zip(&scratch.lanes.inputs) {
                            *sum += dispatch::dot(worker.level, &input[..n], &input[..n]);
                        }
                    }
                    Rule::Ram { epsilon, .. } => {
                        let bound = W::from_f64(*epsilon);
                        let Lanes { inputs, more, .. } = &mut scratch.lanes;
                        let count = &mut more[0][..n];
                        count_movers(worker.level, count, &inputs[..models], bound);
                        for (i, input) in inputs[..models].iter().enumerate() {
                            let (alone, shared) = dispatch::count_alone(worker.level, count, &input[..n], bound);
                            sums[2 * i] += alone as f64;
                            sums[2 * i + 1] += shared as f64;
                        }
                    }
                    Rule::Nearswap { .. } | Rule::Fusion => {}
                }
            }
            let mut all = self.sums.lock().unwrap_or_else(PoisonError::into_inner);
            all.resize(self.elements.div_ceil(BLOCK) as usize, Vec::new());
            all[block as usize] = sums;
        }
        Ok(())
    }

    /// Zeroes the inputs at positions that sce does not select, from place `from` of the buffers on.
    fn select<W: Work>(&self, level: Level, scratch: &mut Scratch<W>, from: usize, elements: &Range<u64>) {
        let Some(bound) = scratch.bounds.first() else { return };
        let (at, before, after) = bound.split(elements);
        let (at, end) = (from + at, from + (elements.end - elements.start) as usize);
        let spread = &scratch.lanes.more[0];
        for input in &mut scratch.lanes.inputs[..self.weights.len()] {
            dispatch::keep_where(level, &mut input[from..at], &spread[from..at], magnitude::<W>(before));
            dispatch::keep_where(level, &mut input[at..end], &spread[at..end], magnitude::<W>(after));
        }
    }

    /// A row belongs to the tile in which it begins, which reads all of it.
    fn measure_rows<W: Work>(&self, worker: Worker<'_>, job: &Job, tile: &Tile) -> Result<()> {
        let rows = tile.elements.start.div_ceil(self.row)..tile.elements.end.div_ceil(self.row);
        let (start, end) = (rows.start * self.row, (rows.end * self.row).min(self.elements));
        let mut found = Vec::with_capacity((rows.end - rows.start) as usize);
        let row = self.row.min(self.elements) as usize;
        let (mut x, mut y, mut apart, mut filled) = (vec![0.0; row], vec![0.0; row], Vec::new(), 0);
        let mut piece = [W::ZERO; MICRO];
        let level = worker.level;
        for at in (start..end).step_by(BLOCK as usize) {
            let window = at..(at + BLOCK).min(end);
            let mut opened = Opened::<W>::new(worker.level, job, &window, worker.pool)?;
            let mut points = opened.points();
            for (_, part) in runs(&window, self.row) {
                let part = window.start + part.start as u64..window.start + part.end as u64;
                for elements in micros(part.clone()) {
                    let piece = &mut piece[..(elements.end - elements.start) as usize];
                    let here = filled..filled + piece.len();
                    points.base(piece, &elements);
                    dispatch::double(level, &mut x[here.clone()], piece);
                    points.model(0, piece, &elements)?;
                    dispatch::double(level, &mut y[here.clone()], piece);
                    filled = here.end;
                }
                if filled == row {
                    found.push(divergence(level, &mut x, &mut y, &mut apart));
                    filled = 0;
                }
            }
        }
        let mut all = self.divergences.lock().unwrap_or_else(PoisonError::into_inner);
        all.resize(self.elements.div_ceil(self.row) as usize, 0.0);
        all[rows.start as usize..rows.end as usize].copy_from_slice(&found);
        Ok(())
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
            self.choose_ranked(worker, job, &block, scratch)?;
        }
        Ok(())
    }

    fn find_cuts<W: Work>(
        &self,
        worker: Worker<'_>,
        points: &mut Points<'_, '_, W>,
        block: &Range<u64>,
        scratch: &mut Scratch<W>,
    ) -> Result<()> {
        let open: Vec<usize> = (0..self.searches.len()).filter(|&i| self.order.cut(i).is_none()).collect();
        let found =
            |i: usize| self.searches[i].found().unwrap_or(crate::select::Threshold { key: 0, equal: 0, take: 0 });
        let mut at = vec![None; self.searches.len()];
        if !open.is_empty() {
            let mut own = vec![0; self.searches.len()];
            for elements in points.spans(block) {
                let n = (elements.end - elements.start) as usize;
                let direct = matches!(self.rule, Rule::Chosen { .. })
                    && open.iter().all(|&i| points.pair(self.over[i], &elements).is_some());
                if !direct {
                    self.values(points, &mut scratch.lanes, 0, &elements)?;
                }
                for &i in &open {
                    let key = magnitude::<W>(found(i).key);
                    own[i] += match points.pair(self.over[i], &elements).filter(|_| direct) {
                        Some((dtype, pair)) => {
                            with_element!(dtype, E => dispatch::count_equal_apart::<E, W>(worker.level, pair, key))
                        }
                        None => {
                            let x = &self.stream(&scratch.lanes, self.over[i])[..n];
                            dispatch::count_equal(worker.level, x, key)
                        }
                    };
                }
            }
            let before = self.order.pass(block.start / BLOCK, &own, worker.control)?;
            for &i in &open {
                let Some(before) = &before else { break };
                let take = found(i).take;
                if before[i] >= take {
                    at[i] = Some(0);
                } else if before[i] + own[i] < take {
                    at[i] = Some(u64::MAX);
                } else {
                    let cut = self.position(points, block, scratch, i, take - before[i])?;
                    self.order.set_cut(i, cut);
                }
            }
        }
        for (i, at) in at.into_iter().enumerate() {
            let at = at.or(self.order.cut(i)).unwrap_or(u64::MAX);
            scratch.bounds.push(Bound { key: found(i).key, at });
        }
        Ok(())
    }

    /// One past the `nth` element of a block that equals the threshold of a search.
    fn position<W: Work>(
        &self,
        points: &mut Points<'_, '_, W>,
        block: &Range<u64>,
        scratch: &mut Scratch<W>,
        search: usize,
        nth: u64,
    ) -> Result<u64> {
        let key = magnitude::<W>(self.searches[search].found().map_or(0, |t| t.key));
        let mut left = nth;
        for elements in micros(block.clone()) {
            self.values(points, &mut scratch.lanes, 0, &elements)?;
            let x = &self.stream(&scratch.lanes, self.over[search])[..(elements.end - elements.start) as usize];
            for (i, x) in x.iter().enumerate() {
                if x.magnitude() == key {
                    left -= 1;
                    if left == 0 {
                        return Ok(elements.start + i as u64 + 1);
                    }
                }
            }
        }
        Ok(block.end)
    }

    /// What the rows of a block leave of each input. Rows that reach beyond the block are read whole.
    fn choose_ranked<W: Work>(
        &self,
        worker: Worker<'_>,
        job: &Job,
        block: &Range<u64>,
        scratch: &mut Scratch<W>,
    ) -> Result<()> {
        let Rule::Chosen { choices, .. } = &self.rule else { return Ok(()) };
        let row = self.row;
        let whole = block.start / row * row..(block.end.div_ceil(row) * row).min(self.elements);
        let n = (whole.end - whole.start) as usize;
        let mut opened = Opened::<W>::new(worker.level, job, &whole, worker.pool)?;
        let mut points = opened.points();
        let Scratch {
            lanes: Lanes { base, more: [shares, ..], .. },
            words,
            lasts,
            chosen,
            chosen_from,
            ranks,
            terms,
            ..
        } = scratch;
        *chosen_from = (block.start - whole.start) as usize;
        let mut finite = true;
        for (i, choice) in choices.iter().enumerate() {
            let Choice::Ranked { generator, density, epsilon, divide } = choice else { continue };
            let wide = &mut chosen[i];
            wide.resize(n, W::ZERO);
            for elements in micros(whole.clone()) {
                let (from, to) = ((elements.start - whole.start) as usize, (elements.end - whole.start) as usize);
                finite &= points.input(i, &mut wide[from..to], &mut base[..to - from], &elements)?;
            }
            if !finite {
                // What is beyond the block is for others to complain about.
                let own = &wide[*chosen_from..*chosen_from + (block.end - block.start) as usize];
                finite = own.iter().all(|x| x.is_finite());
                worker.check::<W>(job, finite, block)?;
                finite = true;
            }
            let last = (row.max(2) - 1) as f64;
            terms.clear();
            terms.extend((0..row.min(self.elements)).map(|rank| {
                let p = if row == 1 { *density } else { (density + epsilon) - (2.0 * epsilon) * (rank as f64 / last) };
                let p = p.clamp(0.0, 1.0);
                match word_bound(p) {
                    0 => (0, W::ZERO),
                    bound => ((bound - 1) as u32, if *divide { W::from_f64(p) } else { W::from_f64(1.0) }),
                }
            }));
            for start in (0..n).step_by(row as usize) {
                let x = &mut wide[start..(start + row as usize).min(n)];
                ranks.find(worker.level, x);
                let at = whole.start + start as u64;
                for piece in micros(at..at + x.len() as u64) {
                    // Counters hold four words each, and rows begin anywhere.
                    let aligned = piece.start / 4 * 4;
                    let words = &mut words[..(piece.end - aligned) as usize];
                    dispatch::words(worker.level, words, *generator, aligned);
                    let words = &words[(piece.start - aligned) as usize..];
                    let (from, n) = ((piece.start - at) as usize, words.len());
                    let (lasts, shares) = (&mut lasts[..n], &mut shares[..n]);
                    for ((last, share), &rank) in lasts.iter_mut().zip(&mut *shares).zip(&ranks.ranks[from..]) {
                        (*last, *share) = terms[rank as usize];
                    }
                    dispatch::keep_drawn(worker.level, &mut x[from..from + n], words, lasts, shares);
                }
            }
        }
        Ok(())
    }

    /// What makes the tiles of the output.
    pub(super) fn update<'a, W: Work>(
        &'a self,
        worker: Worker<'a>,
        job: &'a Job,
        scratch: &'a mut Scratch<W>,
    ) -> impl Update<W> + use<'a, W> {
        scratch.fit(self);
        Combine { mask: self, worker, job, scratch, block: 0, solved: self.solved.get().map_or(&[], Vec::as_slice) }
    }
}

impl<W: Work> Scratch<W> {
    fn fit(&mut self, mask: &Mask) {
        self.lanes.fit(mask.weights.len());
        self.tallies.resize_with(mask.searches.len().max(self.tallies.len()), Tally::default);
        self.words.resize(MICRO + 4, 0);
        self.lasts.resize(MICRO, 0);
        self.chosen.resize_with(mask.weights.len().max(self.chosen.len()), Vec::new);
    }
}

fn count_movers<W: Work>(level: Level, count: &mut [W], inputs: &[Vec<W>], bound: W) {
    count.fill(W::ZERO);
    for input in inputs {
        dispatch::count_moved(level, count, &input[..count.len()], bound);
    }
}

struct Combine<'a, W> {
    mask: &'a Mask,
    worker: Worker<'a>,
    job: &'a Job,
    scratch: &'a mut Scratch<W>,
    /// Where the block begins.
    block: u64,
    solved: &'a [f64],
}

impl<W: Work> Update<W> for Combine<'_, W> {
    fn begin(&mut self, points: &mut Points<'_, '_, W>, block: Range<u64>) -> Result<()> {
        self.block = block.start;
        self.mask.begin(self.worker, self.job, points, block, self.scratch)
    }

    fn make(&mut self, points: &mut Points<'_, '_, W>, u: &mut [W], elements: Range<u64>) -> Result<bool> {
        let mut finite = true;
        for part in points.spans(&elements) {
            let u = &mut u[(part.start - elements.start) as usize..(part.end - elements.start) as usize];
            finite &= self.make_span(points, u, part)?;
        }
        Ok(finite)
    }
}

impl<W: Work> Combine<'_, W> {
    /// What a choice leaves of an input, times `c`; and the sum of that.
    fn keep(
        &mut self,
        points: &mut Points<'_, '_, W>,
        i: usize,
        choice: &Choice,
        elements: &Range<u64>,
    ) -> Result<bool> {
        let (level, n, first) = (points.level, (elements.end - elements.start) as usize, i == 0);
        let c = W::from_f64(self.mask.weights[i] * self.solved[i]);
        let Scratch { lanes: Lanes { base, inputs, more, .. }, words, bounds, chosen, chosen_from, .. } =
            &mut *self.scratch;
        let (x, sum, base) = (&mut inputs[i][..n], &mut more[SUM][..n], &mut base[..n]);
        let everything = (n, 0, 0);
        let ((lowest, floor, later_floor), (highest, ceiling, later_ceiling)) = match choice {
            Choice::Ranked { .. } => {
                let from = *chosen_from + (elements.start - self.block) as usize;
                x.copy_from_slice(&chosen[i][from..from + n]);
                let band = Band { floor: W::Magnitude::default(), ceiling: magnitude::<W>(u64::MAX), c };
                dispatch::keep_scaled(level, x, sum, band, first);
                return Ok(true);
            }
            Choice::Random { generator, bound, .. } => {
                let words = &mut words[..n];
                dispatch::words(level, words, *generator, elements.start);
                if let Some((dtype, pair)) = points.pair(i, elements) {
                    let draw = Draw { words, limit: *bound, c };
                    let largest =
                        with_element!(dtype, E => dispatch::draw_apart::<E, W>(level, x, sum, pair, draw, first));
                    return Ok(W::from_magnitude(largest).is_finite());
                }
                let finite = points.input(i, x, base, elements)?;
                dispatch::keep_random(level, x, words, *bound, W::from_f64(1.0));
                let band = Band { floor: W::Magnitude::default(), ceiling: magnitude::<W>(u64::MAX), c };
                dispatch::keep_scaled(level, x, sum, band, first);
                return Ok(finite);
            }
            Choice::All => (everything, (n, u64::MAX, u64::MAX)),
            Choice::Largest(kept) => (bounds[*kept].split(elements), (n, u64::MAX, u64::MAX)),
            Choice::Between(kept, most) => (bounds[*kept].split(elements), bounds[*most].split(elements)),
        };
        let mut finite = true;
        let mut cuts = [0, lowest, highest, n];
        cuts.sort_unstable();
        for cut in cuts.windows(2).filter(|cut| cut[0] < cut[1]) {
            let floor = if cut[0] < lowest { floor } else { later_floor };
            let ceiling = if cut[0] < highest { ceiling } else { later_ceiling };
            let band = Band { floor: magnitude::<W>(floor), ceiling: magnitude::<W>(ceiling), c };
            let (from, to) = (cut[0], cut[1]);
            let elements = elements.start + from as u64..elements.start + to as u64;
            let (x, sum) = (&mut x[from..to], &mut sum[from..to]);
            if let Some((dtype, pair)) = points.pair(i, &elements) {
                let largest = with_element!(dtype, E => dispatch::keep_apart::<E, W>(level, x, sum, pair, band, first));
                finite &= W::from_magnitude(largest).is_finite();
            } else {
                finite &= points.input(i, x, &mut base[from..to], &elements)?;
                dispatch::keep_scaled(level, x, sum, band, first);
            }
        }
        Ok(finite)
    }

    fn make_span(&mut self, points: &mut Points<'_, '_, W>, u: &mut [W], elements: Range<u64>) -> Result<bool> {
        let (mask, level, n) = (self.mask, points.level, u.len());
        let models = mask.weights.len();
        if let Rule::Chosen { choices, agreement } = &mask.rule {
            let mut finite = true;
            for (i, choice) in choices.iter().enumerate() {
                finite &= self.keep(points, i, choice, &elements)?;
            }
            consensus(level, *agreement, &mask.weights, &mut self.scratch.lanes, u);
            return Ok(finite);
        }
        let finite = mask.values(points, &mut self.scratch.lanes, 0, &elements)?;
        match &mask.rule {
            Rule::Chosen { .. } => {}
            Rule::Sce { agreement } => {
                let sign = &mut self.scratch.lanes.more[2][..n];
                sign.fill(W::ZERO);
                for input in &self.scratch.lanes.inputs[..models] {
                    dispatch::add(level, sign, &input[..n]);
                }
                mask.select(level, self.scratch, 0, &elements);
                let Lanes { inputs, more, .. } = &mut self.scratch.lanes;
                let [_, sum, sign] = more;
                let sum = &mut sum[..n];
                for (i, (input, &w)) in inputs.iter_mut().zip(self.solved).enumerate() {
                    let input = &mut input[..n];
                    dispatch::keep_agreeing(level, input, &sign[..n]);
                    let (floor, ceiling) = (W::Magnitude::default(), magnitude::<W>(u64::MAX));
                    let band = Band { floor, ceiling, c: W::from_f64(w) };
                    dispatch::keep_scaled(level, input, sum, band, i == 0);
                }
                consensus(level, *agreement, self.solved, &mut self.scratch.lanes, u);
            }
            Rule::Ram { epsilon, .. } => {
                let bound = W::from_f64(*epsilon);
                let Lanes { inputs, more, .. } = &mut self.scratch.lanes;
                let count = &mut more[0][..n];
                count_movers(level, count, &inputs[..models], bound);
                u.fill(W::ZERO);
                for (input, &factor) in inputs.iter().zip(self.solved) {
                    dispatch::add_moved(level, u, &input[..n], count, bound, W::from_f64(factor));
                }
                dispatch::divide_by_count(level, u, count);
            }
            Rule::Nearswap { t } => {
                let inputs = &self.scratch.lanes.inputs;
                dispatch::nearer(level, u, &inputs[0][..n], &inputs[1][..n], W::from_f64(*t));
            }
            Rule::Fusion => {
                let Lanes { inputs, more, .. } = &self.scratch.lanes;
                u.copy_from_slice(&inputs[0][..n]);
                let floor = mask.fence.get().copied().unwrap_or(top::<W>());
                dispatch::keep_where(level, u, &more[0][..n], magnitude::<W>(floor));
            }
        }
        Ok(finite)
    }
}

/// Which of a worker's buffers holds the sum of all that stays, for [`consensus`].
const SUM: usize = 1;

/// Adds what stays of each input, already multiplied by `c_i = w_i * scale_i` (f64, rounded once), whose sum over the models is made. With `elect`,
/// the sign is that of the sum, zero counting as positive, and only what has that sign counts (arXiv 2306.01708, section 3). With
/// `normalize`, what counts is divided by its weights (each rounded, added in order), or by all of them without an election.
/// `u = lambda * (sum / divisor)`.
fn consensus<W: Work>(level: Level, agreement: Agreement, weights: &[f64], lanes: &mut Lanes<W>, u: &mut [W]) {
    let n = u.len();
    let Lanes { inputs, more: [share, sum, _], .. } = lanes;
    let (share, sum, lambda) = (&mut share[..n], &sum[..n], W::from_f64(agreement.lambda));
    if agreement.elect {
        for (i, (input, &w)) in inputs.iter().zip(weights).enumerate() {
            dispatch::add_agreeing(level, u, share, &input[..n], sum, W::from_f64(w), i == 0);
        }
    } else {
        u.copy_from_slice(sum);
        share.fill(W::from_f64(weights.iter().fold(0.0, |sum, w| sum + w)));
    }
    if agreement.normalize {
        dispatch::divide(level, u, share, W::from_f64(TINY), lambda);
    } else {
        dispatch::scale(level, u, lambda);
    }
}
