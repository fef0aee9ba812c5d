//! The linear family: `out = target + sum of coefficient * vector`, one pass.
//!
//! Every tile is read once, combined in the first-level cache, rounded once, reported, and digested while it is near. Tensors that do not
//! change are copied by the kernel.

use std::ops::Range;

use crate::bf16::{Element, Work};
use crate::operand::{Reader, first_nonfinite, gather_corrections};
use crate::simd::Level;
use crate::simd::dispatch::{self, MICRO, Rounding, with_element};
use crate::store::digest::BlockHash;
use crate::store::map::{Pool, Window};
use crate::store::writer::Writer;
use crate::store::{Algorithm, TensorView};
use crate::stream::{BLOCK, Tile};
use crate::vector::wide::corrected;
use crate::{Error, Result};

use super::points::{Points, Update};
use super::prepare::Job;

/// What is the same for every tile.
#[derive(Clone, Copy)]
pub(super) struct How {
    pub(super) level: Level,
    pub(super) digest: Algorithm,
    pub(super) allow_nonfinite: bool,
}

/// What one tile adds to what its tensor has gathered.
#[derive(Default)]
pub(super) struct TileResult {
    pub(super) first_block: usize,
    pub(super) out: Vec<BlockHash>,
    pub(super) inputs: Vec<Vec<BlockHash>>,
    pub(super) rounding: Vec<Rounding>,
}

impl TileResult {
    /// What is to be joined from the blocks of a tile.
    pub(super) fn of(job: &Job, tile: &Tile) -> Self {
        let first_block = (tile.elements.start / BLOCK) as usize;
        Self { first_block, inputs: vec![Vec::new(); job.inputs.len()], ..Self::default() }
    }

    /// Takes in what the next block has to say.
    pub(super) fn join(&mut self, next: Self) {
        self.out.extend(next.out);
        for (into, from) in self.inputs.iter_mut().zip(next.inputs) {
            into.extend(from);
        }
        self.rounding.extend(next.rounding);
    }
}

/// Copies a tile inside the kernel, and reads it for its digest.
pub(super) fn copy_tile(how: &How, job: &Job, tile: &Tile, writer: &Writer, pool: &Pool) -> Result<TileResult> {
    let Some((_, target)) = &job.target else { return Err(Error::mismatch(&job.name, "nothing to copy")) };
    let range = target.bytes(tile.elements.clone());
    let size = job.dtype.size() as u64;
    writer.copy_from(target.map(), range.start, job.offset + tile.elements.start * size, range.end - range.start)?;
    let mut hashes = Vec::new();
    for (_, block) in tile.blocks() {
        if how.digest == Algorithm::None && job.equal.is_empty() {
            hashes.push([0; 32]);
            continue;
        }
        let bytes = target.window(block.clone(), pool)?;
        for other in &job.equal {
            check_equal(job, target, other, &bytes, &other.window(block.clone(), pool)?, block.start)?;
        }
        hashes.push(how.digest.hash(&bytes));
    }
    let inputs = vec![hashes.clone()];
    Ok(TileResult { first_block: (tile.elements.start / BLOCK) as usize, out: hashes, inputs, rounding: Vec::new() })
}

#[allow(clippy::too_many_arguments, reason = "the scratch of a worker, piece by piece")]
/// Combines a tile of one block, or of no elements: out = round(target + sum of terms), with its report and its digests.
pub(super) fn combine_tile<O: Element, W: Work>(
    how: &How,
    job: &Job,
    tile: &Tile,
    pool: &Pool,
    out: &mut [u8],
    acc: &mut Vec<W>,
    corrections: &mut Vec<(u32, f64)>,
    update: &mut dyn Update<W>,
) -> Result<TileResult> {
    let How { level, digest: algorithm, allow_nonfinite } = *how;
    let target = match &job.target {
        Some((_, t)) => Some((t, t.window(tile.elements.clone(), pool)?)),
        None => None,
    };
    let mut readers = Vec::with_capacity(job.terms.len());
    for term in &job.terms {
        readers.push(term.open::<W>(tile.elements.clone(), pool)?);
    }
    let span = if job.by_block { BLOCK } else { MICRO as u64 };
    acc.resize(span as usize, W::ZERO);
    let mut result = TileResult::of(job, tile);
    let (mut wide_target, mut change) = ([W::ZERO; MICRO], [W::ZERO; MICRO]);
    let range = tile.elements.clone();
    if range.is_empty() {
        return Ok(result);
    }
    let block = range.start / BLOCK;
    update.begin(&mut points(job, level, &target, tile, &mut readers), range.clone())?;
    gather_corrections(&readers, block, corrections)?;
    let mut pending = corrections.as_slice();
    let mut sums = Rounding::default();
    let mut at = range.start;
    while at < range.end {
        let end = (at + span).min(range.end);
        let points = &mut points(job, level, &target, tile, &mut readers);
        if let Some(report) = at_one_go::<O, W>(job, points, update, out, at..end) {
            sums.join(&report);
            at = end;
            continue;
        }
        let acc = &mut acc[..(end - at) as usize];
        if !update.make(points, acc, at..end)? && !allow_nonfinite {
            return Err(blame_input::<W>(job, level, at..end, pool));
        }
        for (i, u) in acc.chunks(MICRO).enumerate() {
            let from = at + (i * MICRO) as u64;
            let place = (from - range.start) as usize;
            let out = &mut out[place * O::SIZE..(place + u.len()) * O::SIZE];
            let (wide, change) = (&mut wide_target[..u.len()], &mut change[..u.len()]);
            let here = pending.partition_point(|&(p, _)| range.start + u64::from(p) < from + u.len() as u64);
            // Nearly always: one kernel, one look at every element.
            let bytes = match &target {
                Some((t, window)) if t.dtype() == job.dtype => {
                    Some(&window[place * O::SIZE..(place + u.len()) * O::SIZE])
                }
                Some(_) => None,
                None => Some(&NOTHING[..u.len() * O::SIZE]),
            };
            if let Some(bytes) = bytes.filter(|_| here == 0) {
                let (report, finite) = dispatch::finish_report::<O, W>(level, out, bytes, u);
                if !finite && !allow_nonfinite {
                    dispatch::widen::<O, W>(level, wide, bytes);
                    return Err(blame::<O, W>(job, level, from, out, wide, u, pool));
                }
                sums.join(&report);
                continue;
            }
            let mut finite = match &target {
                Some((t, window)) => {
                    let size = t.dtype().size();
                    let bytes = &window[place * size..(place + u.len()) * size];
                    with_element!(t.dtype(), E => dispatch::widen::<E, W>(level, wide, bytes));
                    if t.dtype() == job.dtype {
                        dispatch::finish::<O, W>(level, out, bytes, u)
                    } else {
                        dispatch::finish_as::<O, W>(level, out, wide, u)
                    }
                }
                None => {
                    wide.fill(W::ZERO);
                    dispatch::finish_as::<O, W>(level, out, wide, u)
                }
            };
            for &(p, correction) in &pending[..here] {
                let i = (range.start + u64::from(p) - from) as usize;
                let value = corrected::<O>(wide[i].to_f64(), u[i].to_f64(), correction);
                value.store(&mut out[i * O::SIZE..(i + 1) * O::SIZE]);
            }
            if here > 0 {
                // A correction can decide on which side of the largest number a sum falls.
                finite = out.chunks_exact(O::SIZE).all(|o| O::load(o).finite());
            }
            pending = &pending[here..];
            if !finite && !allow_nonfinite {
                return Err(blame::<O, W>(job, level, from, out, wide, u, pool));
            }
            dispatch::change::<O, W>(level, change, out, wide);
            sums.join(&dispatch::rounding(level, u, change));
        }
        at = end;
    }
    update.end(block);
    result.rounding.push(sums);
    if algorithm != Algorithm::None {
        result.out.push(algorithm.hash(out));
        let windows = target.iter().map(|(_, w)| &**w).chain(readers.iter().flat_map(Reader::windows));
        for (bytes, hashes) in windows.zip(&mut result.inputs) {
            hashes.push(algorithm.hash(bytes));
        }
    }
    Ok(result)
}

/// The output, and its report, where the update is one difference in the format of all: nearly always, and then the update is never in memory.
/// `None` where it is another, or a closer look is needed.
fn at_one_go<O: Element, W: Work>(
    job: &Job,
    points: &Points<'_, '_, W>,
    update: &dyn Update<W>,
    out: &mut [u8],
    elements: Range<u64>,
) -> Option<Rounding> {
    let (_, target) = points.base.filter(|(dtype, _)| *dtype == job.dtype)?;
    let (pair, c) = update.difference(points, &elements)?;
    let [from, to] = [elements.start, elements.end].map(|i| (i - points.from) as usize * O::SIZE);
    dispatch::difference_report::<O, W>(points.level, &mut out[from..to], &target[from..to], pair, c)
}

/// A target of zeros, for what has none.
static NOTHING: [u8; MICRO * size_of::<f64>()] = [0; MICRO * size_of::<f64>()];

/// What a family may read of a tile.
fn points<'r, 'a, W>(
    job: &Job,
    level: Level,
    target: &'r Option<(&TensorView, Window<'_>)>,
    tile: &Tile,
    readers: &'r mut [Reader<'a, W>],
) -> Points<'r, 'a, W> {
    let base = target.as_ref().map(|(t, w)| (t.dtype(), &**w));
    Points { level, base, from: tile.elements.start, readers, steps: job.steps }
}

/// The sum of the terms.
pub(super) struct Sum;

impl<W: Work> Update<W> for Sum {
    fn difference<'r>(&self, points: &'r Points<'_, '_, W>, elements: &Range<u64>) -> Option<([&'r [u8]; 2], W)> {
        let [reader] = &*points.readers else { return None };
        let (dtype, _) = points.base?;
        let pair = reader.donors(elements).filter(|pair| pair.iter().all(|of| of.0 == dtype))?;
        Some((pair.map(|(_, bytes)| bytes), reader.coefficient()))
    }

    fn make(&mut self, points: &mut Points<'_, '_, W>, u: &mut [W], elements: Range<u64>) -> Result<bool> {
        if points.readers.is_empty() {
            u.fill(W::ZERO);
        }
        for (i, reader) in points.readers.iter_mut().enumerate() {
            reader.add(points.level, u, elements.clone(), i == 0)?;
        }
        Ok(true)
    }
}

fn check_equal(job: &Job, a: &TensorView, b: &TensorView, x: &[u8], y: &[u8], from: u64) -> Result<()> {
    if x == y {
        return Ok(());
    }
    let byte = x.iter().zip(y).position(|(x, y)| x != y).unwrap_or(0);
    let index = from + (byte / job.dtype.size()) as u64;
    Err(Error::mismatch(
        &job.name,
        format!(
            "integers and booleans pass only if they are equal, and element {index} of this {} differs between {} and {}; leave the tensor out with --exclude to keep the target's",
            job.dtype,
            a.map().path().display(),
            b.map().path().display()
        ),
    ))
}

const OVERFLOW: &str = "the sum does not fit the output's format; use a smaller alpha or --out-dtype float32";

/// Which input is not finite among some elements of which a method says that one is.
pub(super) fn blame_input<W: Work>(job: &Job, level: Level, elements: Range<u64>, pool: &Pool) -> Error {
    let tensors: Vec<&TensorView> = job.target.iter().map(|(_, t)| t).collect();
    match first_nonfinite::<W>(&job.name, &tensors, &job.terms, level, elements.clone(), pool) {
        Ok(Some(error)) | Err(error) => error,
        Ok(None) => {
            let path = job.terms.first().map(crate::operand::Term::path).unwrap_or_default();
            let value = "too far from the base for the work type".into();
            Error::NonFinite { path, tensor: job.name.clone(), index: elements.start, value, advice: OVERFLOW }
        }
    }
}

/// Which input brought the NaN or infinity that some output of these elements has.
fn blame<O: Element, W: Work>(job: &Job, level: Level, from: u64, out: &[u8], t: &[W], u: &[W], pool: &Pool) -> Error {
    let tensors: Vec<&TensorView> = job.target.iter().map(|(_, t)| t).collect();
    match first_nonfinite::<W>(&job.name, &tensors, &job.terms, level, from..from + u.len() as u64, pool) {
        Ok(Some(error)) | Err(error) => error,
        Ok(None) => {
            let i = out.chunks_exact(O::SIZE).position(|o| !O::load(o).finite()).unwrap_or(0);
            let term = || job.terms.first().map(crate::operand::Term::path).unwrap_or_default();
            let path = job.target.as_ref().map_or_else(term, |(_, t)| t.map().path().to_path_buf());
            let value = format!("{} after the update", (t[i] + u[i]).to_f64());
            Error::NonFinite { path, tensor: job.name.clone(), index: from + i as u64, value, advice: OVERFLOW }
        }
    }
}
