//! What needs whole rows: divergences, and choices by rank.

use std::ops::Range;
use std::sync::PoisonError;

use crate::Result;
use crate::bf16::Work;
use crate::simd::dispatch::{self, MICRO};
use crate::stream::{BLOCK, Tile};

use super::super::gram::{micros, runs};
use super::super::method::Worker;
use super::super::points::{Lanes, Opened, Points, round};
use super::super::prepare::Job;
use super::super::rows::divergence;
use super::foresight::close;
use super::{Choice, Mask, Rule, Scratch};

impl Mask {
    /// The divergences of the rows that begin in a tile, which reads all of them, and the first pass over the importances that follow.
    pub(super) fn measure_rows<W: Work>(
        &self,
        worker: Worker<'_>,
        job: &Job,
        tile: &Tile,
        scratch: &mut Scratch<W>,
    ) -> Result<()> {
        let passes = self.passes();
        let rows = tile.elements.start.div_ceil(self.row)..tile.elements.end.div_ceil(self.row);
        let (start, end) = (rows.start * self.row, (rows.end * self.row).min(self.elements));
        let mut found = Vec::with_capacity((rows.end - rows.start) as usize);
        let row = self.row.min(self.elements) as usize;
        let (mut x, mut y, mut filled) = (vec![W::ZERO; row], vec![W::ZERO; row], 0);
        for at in (start..end).step_by(BLOCK as usize) {
            let window = at..(at + BLOCK).min(end);
            let mut opened = Opened::<W>::new(worker.level, job, &window, worker.pool)?;
            let mut points = opened.points();
            for (_, part) in runs(&window, self.row) {
                let part = window.start + part.start as u64..window.start + part.end as u64;
                for elements in micros(part.clone()) {
                    let here = filled..filled + (elements.end - elements.start) as usize;
                    points.base(&mut x[here.clone()], &elements);
                    points.model(0, &mut y[here.clone()], &elements)?;
                    filled = here.end;
                }
                if filled == row {
                    let c = divergence(worker.level, &x, &y);
                    found.push(c);
                    self.weigh_row(worker, job, [&mut x, &mut y], part.end - row as u64, c, |weighed| {
                        for (pass, tally) in passes.iter().zip(&mut scratch.tallies) {
                            if let Some(pass) = pass {
                                pass.count(worker.level, weighed, tally);
                            }
                        }
                    })?;
                    filled = 0;
                }
            }
        }
        close(&passes, tile.elements.start / BLOCK, scratch);
        let mut all = self.divergences.lock().unwrap_or_else(PoisonError::into_inner);
        all.resize(self.elements.div_ceil(self.row) as usize, 0.0);
        all[rows.start as usize..rows.end as usize].copy_from_slice(&found);
        Ok(())
    }

    /// The importances of elements that a sample takes, whose rows nobody has measured yet.
    pub(super) fn sample_rows<W: Work>(
        &self,
        worker: Worker<'_>,
        job: &Job,
        place: &Range<u64>,
        sample: &mut Vec<W>,
    ) -> Result<()> {
        for number in place.start / self.row..place.end.div_ceil(self.row) {
            let whole = number * self.row..((number + 1) * self.row).min(self.elements);
            let mut opened = Opened::<W>::new(worker.level, job, &whole, worker.pool)?;
            let mut points = opened.points();
            let n = (whole.end - whole.start) as usize;
            let (mut x, mut y) = (vec![W::ZERO; n], vec![W::ZERO; n]);
            for (elements, (x, y)) in micros(whole.clone()).zip(x.chunks_mut(MICRO).zip(y.chunks_mut(MICRO))) {
                points.base(x, &elements);
                points.model(0, y, &elements)?;
            }
            let c = divergence(worker.level, &x, &y);
            let part = place.start.max(whole.start)..place.end.min(whole.end);
            let here = (part.start - whole.start) as usize..(part.end - whole.start) as usize;
            let pair = [&mut x[here.clone()], &mut y[here]];
            self.weigh_row(worker, job, pair, part.start, c, |weighed| sample.extend_from_slice(weighed))?;
        }
        Ok(())
    }

    /// Makes importances of some elements of a row, of the base and of the model, from an index on, and hands them on a MICRO at a time. What
    /// was in the buffers is used up.
    fn weigh_row<W: Work>(
        &self,
        worker: Worker<'_>,
        job: &Job,
        [base, model]: [&mut [W]; 2],
        from: u64,
        divergence: f64,
        mut take: impl FnMut(&[W]),
    ) -> Result<()> {
        let level = worker.level;
        for (i, (base, model)) in base.chunks_mut(MICRO).zip(model.chunks_mut(MICRO)).enumerate() {
            round(level, model, job.steps);
            round(level, base, job.steps);
            let largest = dispatch::less(level, model, base);
            round(level, model, job.steps);
            let at = from + (i * MICRO) as u64;
            let finite = W::from_magnitude(largest).is_finite();
            worker.check::<W>(job, finite, &(at..at + model.len() as u64))?;
            dispatch::weigh(level, base, model, divergence);
            take(base);
        }
        Ok(())
    }

    /// What the rows of a block leave of each input. Of rows that reach beyond the block, what is there is read too.
    pub(super) fn choose_ranked<W: Work>(
        &self,
        worker: Worker<'_>,
        job: &Job,
        points: &mut Points<'_, '_, W>,
        block: &Range<u64>,
        scratch: &mut Scratch<W>,
    ) -> Result<()> {
        let Rule::Chosen { choices, .. } = &self.rule else { return Ok(()) };
        let row = self.row;
        let whole = block.start / row * row..(block.end.div_ceil(row) * row).min(self.elements);
        let n = (whole.end - whole.start) as usize;
        let mut beyond = Vec::new();
        for part in [whole.start..block.start, block.end..whole.end].into_iter().filter(|part| !part.is_empty()) {
            beyond.push((Opened::<W>::new(worker.level, job, &part, worker.pool)?, part));
        }
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
            finite &= read_part(points, i, block, &mut wide[*chosen_from..], base)?;
            for (opened, part) in &mut beyond {
                let from = (part.start - whole.start) as usize;
                finite &= read_part(&mut opened.points(), i, part, &mut wide[from..], base)?;
            }
            if !finite {
                // What is beyond the block is for others to complain about.
                let own = &wide[*chosen_from..*chosen_from + (block.end - block.start) as usize];
                finite = own.iter().all(|x| x.is_finite());
                worker.check::<W>(job, finite, block)?;
                finite = true;
            }
            let terms = terms.fit((row, *density, *epsilon, *divide));
            for start in (0..n).step_by(row as usize) {
                let x = &mut wide[start..(start + row as usize).min(n)];
                ranks.find(worker.level, x);
                let at = whole.start + start as u64;
                for piece in micros(at..at + x.len() as u64) {
                    // Counters hold four words each, and rows begin anywhere.
                    let aligned = piece.start / 4 * 4;
                    let words = &mut words[0][..(piece.end - aligned) as usize];
                    dispatch::words(worker.level, words, *generator, aligned);
                    let words = &words[(piece.start - aligned) as usize..];
                    let (from, n) = ((piece.start - at) as usize, words.len());
                    let groups = from / 64..(from + n).div_ceil(64);
                    let (ranks, some) = (&ranks.ranks[from..groups.end * 64], &ranks.some[groups]);
                    dispatch::look_up(worker.level, lasts, shares, ranks, terms, some);
                    let (lasts, shares) = (&lasts[..n], &shares[..n]);
                    dispatch::keep_drawn(worker.level, &mut x[from..from + n], words, lasts, shares);
                }
            }
        }
        Ok(())
    }
}

/// Reads an input. Whether all of it is finite.
fn read_part<W: Work>(
    points: &mut Points<'_, '_, W>,
    i: usize,
    part: &Range<u64>,
    into: &mut [W],
    base: &mut [W],
) -> Result<bool> {
    let mut finite = true;
    for (elements, into) in micros(part.clone()).zip(into.chunks_mut(MICRO)) {
        let n = (elements.end - elements.start) as usize;
        finite &= points.input(i, &mut into[..n], &mut base[..n], &elements)?;
    }
    Ok(finite)
}
