//! Sums over what is chosen, and what follows from them for each model.

use std::ops::Range;
use std::sync::PoisonError;

use crate::Result;
use crate::bf16::Work;
use crate::select::magnitude;
use crate::simd::Level;
use crate::simd::dispatch::{self, MICRO};
use crate::stream::{BLOCK, Tile};

use super::super::gram::micros;
use super::super::method::Worker;
use super::super::points::{Lanes, Opened};
use super::super::prepare::Job;
use super::{Choice, Mask, Rule, Scratch};

impl Mask {
    /// What follows from the sums of the tensor for each model.
    pub(super) fn solve_sums(&self, sums: &[f64]) {
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
            Rule::Sce { floor, .. } => {
                let total = sums.iter().fold(0.0, |sum, x| sum + x);
                let equal = total < floor * self.elements as f64;
                let weight = |x: &f64| match total {
                    0.0 => 0.0,
                    _ if equal => 1.0 / sums.len() as f64,
                    _ => x / total,
                };
                sums.iter().map(weight).collect()
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

    /// The sums of every block of a tile.
    pub(super) fn sum<W: Work>(
        &self,
        worker: Worker<'_>,
        job: &Job,
        tile: &Tile,
        scratch: &mut Scratch<W>,
    ) -> Result<()> {
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
                                    let words = &mut scratch.words[0][..n];
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
    pub(super) fn select<W: Work>(&self, level: Level, scratch: &mut Scratch<W>, from: usize, elements: &Range<u64>) {
        let Some(bound) = scratch.bounds.first() else { return };
        let (at, before, after) = bound.split(elements);
        let (at, end) = (from + at, from + (elements.end - elements.start) as usize);
        let spread = &scratch.lanes.more[0];
        for input in &mut scratch.lanes.inputs[..self.weights.len()] {
            dispatch::keep_where(level, &mut input[from..at], &spread[from..at], magnitude::<W>(before));
            dispatch::keep_where(level, &mut input[at..end], &spread[at..end], magnitude::<W>(after));
        }
    }
}

pub(super) fn count_movers<W: Work>(level: Level, count: &mut [W], inputs: &[Vec<W>], bound: W) {
    count.fill(W::ZERO);
    for input in inputs {
        dispatch::count_moved(level, count, &input[..count.len()], bound);
    }
}
