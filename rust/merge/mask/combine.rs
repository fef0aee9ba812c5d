//! The masked pass.

use std::ops::Range;

use crate::Result;
use crate::bf16::Work;
use crate::dtype::Dtype;
use crate::select::{magnitude, top};
use crate::simd::Level;
use crate::simd::dispatch::{self, Band, Draw, Vote, with_element};

use super::super::method::Worker;
use super::super::points::{Lanes, Points, Update, round};
use super::super::prepare::Job;
use super::sums::count_movers;
use super::{Agreement, Choice, Mask, Rule, Scratch};

/// A sum of weights smaller than this divides nothing.
const TINY: f64 = 1e-8;

impl Mask {
    /// What makes the tiles of the output.
    pub(in crate::merge) fn update<'a, W: Work>(
        &'a self,
        worker: Worker<'a>,
        job: &'a Job,
        scratch: &'a mut Scratch<W>,
    ) -> impl Update<W> + use<'a, W> {
        scratch.fit(self);
        self.combine(worker, job, scratch)
    }

    pub(super) fn combine<'a, W: Work>(
        &'a self,
        worker: Worker<'a>,
        job: &'a Job,
        scratch: &'a mut Scratch<W>,
    ) -> Combine<'a, W> {
        Combine { mask: self, worker, job, scratch, block: 0, solved: self.solved.get().map_or(&[], Vec::as_slice) }
    }
}

pub(super) struct Combine<'a, W> {
    pub(super) mask: &'a Mask,
    pub(super) worker: Worker<'a>,
    pub(super) job: &'a Job,
    pub(super) scratch: &'a mut Scratch<W>,
    /// Where the block begins.
    pub(super) block: u64,
    solved: &'a [f64],
}

impl<W: Work> Update<W> for Combine<'_, W> {
    fn begin(&mut self, points: &mut Points<'_, '_, W>, block: Range<u64>) -> Result<()> {
        self.block = block.start;
        self.mask.begin(self.worker, self.job, points, block, self.scratch)
    }

    fn make(&mut self, points: &mut Points<'_, '_, W>, u: &mut [W], elements: Range<u64>) -> Result<bool> {
        if let Some(finite) = self.vote(points, u, &elements) {
            return Ok(finite);
        }
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
                let words = &mut words[0][..n];
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

    /// The update in one go, of two tensors of the base's format from which magnitudes or random words choose, or of what ranks chose from them.
    /// `None` where it is another case; else whether all differences are finite.
    fn vote(&mut self, points: &Points<'_, '_, W>, u: &mut [W], elements: &Range<u64>) -> Option<bool> {
        let Rule::Chosen { choices, agreement } = &self.mask.rule else { return None };
        let [first, second] = &choices[..] else { return None };
        let (level, weights) = (points.level, &self.mask.weights);
        let rule = vote_of(weights, *agreement);
        let c = [0, 1].map(|i| W::from_f64(weights[i] * self.solved[i]));
        if let (Choice::Ranked { .. }, Choice::Ranked { .. }) = (first, second) {
            if self.job.steps.is_some() {
                return None;
            }
            let Scratch { chosen, chosen_from, .. } = &*self.scratch;
            let from = chosen_from + (elements.start - self.block) as usize;
            let here = from..from + u.len();
            dispatch::vote(level, u, [&chosen[0][here.clone()], &chosen[1][here]], c, rule);
            return Some(true);
        }
        let ((dtype, [x, base]), (_, [y, _])) = (points.pair(0, elements)?, points.pair(1, elements)?);
        let limits = [first, second].map(|choice| match choice {
            Choice::All => Some(u64::from(u32::MAX) + 1),
            Choice::Random { bound, .. } => Some(*bound),
            _ => None,
        });
        if let [Some(one), Some(other)] = limits {
            let words = &mut self.scratch.words;
            for (words, choice) in words.iter_mut().zip(choices) {
                if let Choice::Random { generator, .. } = choice {
                    dispatch::words(level, &mut words[..u.len()], *generator, elements.start);
                }
            }
            let draws = [
                Draw { words: &words[0][..u.len()], limit: one, c: c[0] },
                Draw { words: &words[1][..u.len()], limit: other, c: c[1] },
            ];
            let largest = with_element!(dtype, E => dispatch::vote_drawn::<E, W>(level, u, [x, y], base, draws, rule));
            return Some(W::from_magnitude(largest).is_finite());
        }
        let ends = [self.ends(first, elements)?, self.ends(second, elements)?];
        let mut cuts = [0, ends[0][0].0, ends[0][1].0, ends[1][0].0, ends[1][1].0, u.len()];
        cuts.sort_unstable();
        let mut largest = W::Magnitude::default();
        for cut in cuts.windows(2).filter(|cut| cut[0] < cut[1]) {
            let (from, to) = (cut[0], cut[1]);
            let bands = [0, 1].map(|i| {
                let [floor, ceiling] =
                    ends[i].map(|(at, before, after)| magnitude::<W>(if from < at { before } else { after }));
                Band { floor, ceiling, c: c[i] }
            });
            let bytes = from * dtype.size()..to * dtype.size();
            let (pairs, base) = ([&x[bytes.clone()], &y[bytes.clone()]], &base[bytes]);
            let u = &mut u[from..to];
            let here = with_element!(dtype, E => dispatch::vote_apart::<E, W>(level, u, pairs, base, bands, rule));
            largest = largest.max(here);
        }
        Some(W::from_magnitude(largest).is_finite())
    }

    /// Floor and ceiling of what magnitudes choose, each as [`Bound::split`] says it.
    fn ends(&self, choice: &Choice, elements: &Range<u64>) -> Option<[(usize, u64, u64); 2]> {
        let n = (elements.end - elements.start) as usize;
        let bounds = &self.scratch.bounds;
        match choice {
            Choice::All => Some([(n, 0, 0), (n, u64::MAX, u64::MAX)]),
            Choice::Largest(kept) => Some([bounds[*kept].split(elements), (n, u64::MAX, u64::MAX)]),
            Choice::Between(kept, most) => Some([bounds[*kept].split(elements), bounds[*most].split(elements)]),
            Choice::Random { .. } | Choice::Ranked { .. } => None,
        }
    }

    fn make_span(&mut self, points: &mut Points<'_, '_, W>, u: &mut [W], elements: Range<u64>) -> Result<bool> {
        let (mask, level, n) = (self.mask, points.level, u.len());
        let models = mask.weights.len();
        if let Rule::Chosen { choices, agreement } = &mask.rule {
            let mut finite = true;
            for (i, choice) in choices.iter().enumerate() {
                finite &= self.keep(points, i, choice, &elements)?;
            }
            if self.job.steps.is_some() {
                let Lanes { inputs, more, .. } = &mut self.scratch.lanes;
                let sum = &mut more[SUM][..n];
                sum.fill(W::ZERO);
                for input in &mut inputs[..models] {
                    round(level, &mut input[..n], self.job.steps);
                    dispatch::add(level, sum, &input[..n]);
                }
            }
            consensus(level, *agreement, &mask.weights, self.job.steps, &mut self.scratch.lanes, u);
            return Ok(finite);
        }
        let finite = mask.values(points, &mut self.scratch.lanes, 0, &elements)?;
        match &mask.rule {
            Rule::Chosen { .. } => {}
            Rule::Sce { agreement, .. } => {
                let sign = &mut self.scratch.lanes.more[2][..n];
                sign.fill(W::ZERO);
                for input in &self.scratch.lanes.inputs[..models] {
                    dispatch::add(level, sign, &input[..n]);
                }
                mask.select(level, self.scratch, 0, &elements);
                let Lanes { inputs, more, .. } = &mut self.scratch.lanes;
                let [_, sum, sign] = more;
                for input in &mut inputs[..models] {
                    dispatch::keep_agreeing(level, &mut input[..n], &sign[..n]);
                }
                if let ([first, second, ..], [w, v]) = (&inputs[..], self.solved) {
                    let c = [W::from_f64(*w), W::from_f64(*v)];
                    dispatch::vote(level, u, [&first[..n], &second[..n]], c, vote_of(self.solved, *agreement));
                    return Ok(finite);
                }
                let sum = &mut sum[..n];
                for (i, (input, &w)) in inputs.iter_mut().zip(self.solved).enumerate() {
                    let (floor, ceiling) = (W::Magnitude::default(), magnitude::<W>(u64::MAX));
                    let band = Band { floor, ceiling, c: W::from_f64(w) };
                    dispatch::keep_scaled(level, &mut input[..n], sum, band, i == 0);
                }
                consensus(level, *agreement, self.solved, None, &mut self.scratch.lanes, u);
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

/// [`consensus`] of two, as kernels take it.
fn vote_of<W: Work>(weights: &[f64], agreement: Agreement) -> Vote<W> {
    let one = W::from_f64(1.0);
    let by = |share: W| if !agreement.normalize || share.abs() < W::from_f64(TINY) { one } else { share };
    let [first, second] = [weights[0], weights[1]].map(W::from_f64);
    let all = weights.iter().fold(0.0, |sum, w| sum + w);
    let both = if agreement.elect { first + second } else { W::from_f64(all) };
    let divisors = [one, by(first), by(second), by(both)];
    Vote { elect: agreement.elect, divisors, lambda: W::from_f64(agreement.lambda) }
}

/// Which of a worker's buffers holds the sum of all that stays, for [`consensus`].
const SUM: usize = 1;

/// Adds what stays of each input, already multiplied by `c_i = w_i * scale_i` (f64, rounded once), whose sum over the models is made. With `elect`,
/// the sign is that of the sum, zero counting as positive, and only what has that sign counts (arXiv 2306.01708, section 3). With
/// `normalize`, what counts is divided by its weights (each rounded, added in order), or by all of them without an election.
/// `u = lambda * (sum / divisor)`. With `steps`, sum, divisor, quotient and product are each rounded to that format.
fn consensus<W: Work>(
    level: Level,
    agreement: Agreement,
    weights: &[f64],
    steps: Option<Dtype>,
    lanes: &mut Lanes<W>,
    u: &mut [W],
) {
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
    let (least, one) = (W::from_f64(TINY), W::from_f64(1.0));
    if steps.is_some() {
        round(level, u, steps);
        round(level, share, steps);
        if agreement.normalize {
            dispatch::divide(level, u, share, least, one);
            round(level, u, steps);
        }
        dispatch::scale(level, u, lambda);
        round(level, u, steps);
    } else if agreement.normalize {
        dispatch::divide(level, u, share, least, lambda);
    } else {
        dispatch::scale(level, u, lambda);
    }
}
