//! Looking without changing: Gram matrices of quantities, exact differences, digests.

use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::bf16::Work;
use crate::operand::{Reader, Term, first_nonfinite, gather_corrections};
use crate::plan::{Operands, Settings, TermPlan, noises, scale_noise};
use crate::simd::Level;
use crate::simd::dispatch::{self, Extent, MICRO};
use crate::store::digest::BlockHash;
use crate::store::map::Pool;
use crate::store::{Algorithm, Checkpoint, TensorView};
use crate::stream::{BLOCK, Budget, Control, Grid, pass};
use crate::vector::VectorFolder;
use crate::{Error, Result};

/// Quantities to measure, tensor by tensor.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MeasurePlan {
    /// The tensors.
    pub tensors: Vec<MeasureTensor>,
    /// Whether NaN and infinity may be among them.
    #[serde(default)]
    pub allow_nonfinite: bool,
    /// How to run.
    #[serde(flatten)]
    pub settings: Settings,
}

/// Quantities with as many elements as each other.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MeasureTensor {
    /// What to call them together.
    pub name: String,
    /// Their elements.
    pub elements: u64,
    /// The quantities, each a sum of terms.
    pub quantities: Vec<Vec<TermPlan>>,
}

/// What was measured of a tensor with `k` quantities.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Measured {
    /// The name of the plan.
    pub name: String,
    /// The `k x k` sums of products, row by row.
    pub gram: Vec<f64>,
    /// Non-zero elements of each.
    pub moved: Vec<u64>,
    /// Largest absolute value of each.
    pub max: Vec<f64>,
    /// Its first position; `None` when all are zero.
    pub max_at: Vec<Option<u64>>,
    /// `k x k`: positions at which both are non-zero.
    pub both: Vec<u64>,
    /// `k x k`: those at which both have the same sign.
    pub agree: Vec<u64>,
}

impl Measured {
    fn new(name: &str, k: usize) -> Self {
        Self {
            name: name.to_owned(),
            gram: vec![0.0; k * k],
            moved: vec![0; k],
            max: vec![0.0; k],
            max_at: vec![None; k],
            both: vec![0; k * k],
            agree: vec![0; k * k],
        }
    }

    fn join(&mut self, next: &Self) {
        let add = |a: &mut [u64], b: &[u64]| a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
        self.gram.iter_mut().zip(&next.gram).for_each(|(a, b)| *a += b);
        add(&mut self.moved, &next.moved);
        add(&mut self.both, &next.both);
        add(&mut self.agree, &next.agree);
        for i in 0..self.max.len() {
            if next.max[i] > self.max[i] {
                self.max[i] = next.max[i];
                self.max_at[i] = next.max_at[i];
            }
        }
    }
}

struct Job {
    quantities: Vec<Vec<Term>>,
    double: bool,
}

/// Measures every quantity and every pair of a plan in one pass.
///
/// # Errors
/// [`Error::Mismatch`] for quantities that do not fit, [`Error::NonFinite`], [`Error::Io`], [`Error::Cancelled`].
pub fn measure(plan: &MeasurePlan, operands: Operands<'_>, control: &Control) -> Result<Vec<Measured>> {
    let level = Level::current()?;
    let mut jobs = Vec::with_capacity(plan.tensors.len());
    let (mut per_block, mut bytes) = (0, 0u64);
    for t in &plan.tensors {
        let mut quantities = Vec::with_capacity(t.quantities.len());
        let mut double = false;
        for q in &t.quantities {
            let mut terms: Vec<Term> =
                q.iter().map(|term| operands.term(term, &t.name, t.elements)).collect::<Result<_>>()?;
            double |= terms.iter().any(Term::is_double);
            terms.retain(|t| !t.sources().iter().all(|s| s.is_zero()));
            quantities.push(terms);
        }
        let terms = || quantities.iter().flatten();
        let work = if double { 8 } else { 4 };
        let held = terms().map(|t| t.memory().0).sum::<u64>() + work * quantities.len() as u64;
        per_block = per_block.max(held * BLOCK + terms().map(|t| t.memory().1).sum::<u64>());
        bytes += terms()
            .flat_map(Term::sources)
            .map(|s| s.stored_bytes() + s.tensors().iter().map(|t| t.entry.end - t.entry.begin).sum::<u64>())
            .sum::<u64>();
        jobs.push(Job { quantities, double });
    }
    let named = jobs.iter_mut().zip(&plan.tensors);
    let noises =
        named.flat_map(|(j, t)| noises(&t.name, t.elements, j.double, j.quantities.iter_mut().flatten())).collect();
    scale_noise(noises, plan.allow_nonfinite, &plan.settings, control)?;
    // Where nothing is stored nothing is looked at: a vector can say of a zero that it is as long as it likes.
    let lengths = jobs
        .iter()
        .zip(&plan.tensors)
        .map(|(j, t)| if j.quantities.iter().all(Vec::is_empty) { 0 } else { t.elements });
    let lengths: Vec<u64> = lengths.collect();
    let total = lengths.iter().sum::<u64>().max(1);
    let grid = Grid::new(lengths, 1);
    let budget = Budget::share(plan.settings.memory_budget, plan.settings.threads(), 0, per_block.max(1), 1);
    let results: Vec<Mutex<Vec<Option<Measured>>>> =
        (0..jobs.len()).map(|i| Mutex::new(vec![None; grid.tiles_of(i)])).collect();
    control.expect(bytes);
    pass::run(
        &grid,
        budget.threads,
        control,
        || (Pool::default(), Vec::<Vec<f32>>::new(), Vec::<Vec<f64>>::new()),
        |tile| jobs[tile.tensor].quantities.iter().flatten().for_each(|t| t.prefetch(tile.elements.clone())),
        |(pool, single, double), _, tile| {
            let job = &jobs[tile.tensor];
            let name = &plan.tensors[tile.tensor].name;
            let range = tile.elements.clone();
            let measured = if job.double {
                measure_block(job, name, level, range, pool, double, plan.allow_nonfinite)?
            } else {
                measure_block(job, name, level, range, pool, single, plan.allow_nonfinite)?
            };
            let slot = (tile.elements.start / BLOCK) as usize;
            results[tile.tensor].lock().unwrap_or_else(PoisonError::into_inner)[slot] = Some(measured);
            let share = (tile.elements.end - tile.elements.start) as u128 * bytes as u128 / total as u128;
            control.advance(share as u64);
            Ok(())
        },
    )?;
    Ok(results
        .into_iter()
        .zip(&plan.tensors)
        .map(|(blocks, t)| {
            let mut sum = Measured::new(&t.name, t.quantities.len());
            let blocks = blocks.into_inner().unwrap_or_else(PoisonError::into_inner);
            blocks.iter().flatten().for_each(|b| sum.join(b));
            sum
        })
        .collect())
}

fn measure_block<W: Work>(
    job: &Job,
    name: &str,
    level: Level,
    range: std::ops::Range<u64>,
    pool: &Pool,
    buffers: &mut Vec<Vec<W>>,
    allow_nonfinite: bool,
) -> Result<Measured> {
    let k = job.quantities.len();
    let n = (range.end - range.start) as usize;
    buffers.resize_with(k.max(buffers.len()), Vec::new);
    for (terms, buffer) in job.quantities.iter().zip(buffers.iter_mut()) {
        buffer.resize(BLOCK as usize, W::ZERO);
        for (i, term) in terms.iter().enumerate() {
            term.open::<W>(range.clone(), pool)?.add(level, &mut buffer[..n], range.clone(), i == 0)?;
        }
        if terms.is_empty() {
            buffer[..n].fill(W::ZERO);
        }
    }
    let mut sum = Measured::new(name, k);
    let mut start = 0;
    while start < n {
        let end = (start + MICRO).min(n);
        let mut here = Measured::new("", k);
        for i in 0..k {
            let x = &buffers[i][start..end];
            let Extent { max, moved, finite, squares } = dispatch::extent(level, x);
            if !finite && !allow_nonfinite {
                let at = range.start + start as u64..range.start + end as u64;
                if let Some(error) = first_nonfinite::<W>(name, &[], &job.quantities[i], level, at, pool)? {
                    return Err(error);
                }
            }
            here.moved[i] = moved;
            here.max[i] = max.to_f64();
            if max > sum_max::<W>(&sum, i) {
                here.max_at[i] = x.iter().position(|v| v.abs() == max).map(|p| range.start + (start + p) as u64);
            }
            for (j, y) in buffers.iter().enumerate().take(k).skip(i) {
                let y = &y[start..end];
                let dot = if i == j { squares } else { dispatch::dot(level, x, y) };
                here.gram[i * k + j] = dot;
                here.gram[j * k + i] = dot;
                if i != j {
                    let (both, agree) = dispatch::agreement(level, x, y);
                    for at in [i * k + j, j * k + i] {
                        here.both[at] = both;
                        here.agree[at] = agree;
                    }
                } else {
                    here.both[i * k + i] = moved;
                    here.agree[i * k + i] = moved;
                }
            }
        }
        sum.join(&here);
        start = end;
    }
    Ok(sum)
}

fn sum_max<W: Work>(sum: &Measured, i: usize) -> W {
    W::from_f64(sum.max[i])
}

/// Sums of terms over some elements of one tensor, for whoever wants the values themselves.
///
/// # Errors
/// As [`measure`].
pub fn values<W: Work>(
    terms: &[TermPlan],
    name: &str,
    elements: u64,
    range: std::ops::Range<u64>,
    operands: Operands<'_>,
    control: &Control,
) -> Result<Vec<W>> {
    let level = Level::current()?;
    if range.start > range.end || range.end > elements {
        return Err(Error::mismatch(name, format!("elements {}..{} of {elements}", range.start, range.end)));
    }
    let mut terms: Vec<Term> = terms.iter().map(|t| operands.term(t, name, elements)).collect::<Result<_>>()?;
    scale_noise(noises(name, elements, size_of::<W>() == 8, &mut terms), true, &Settings::default(), control)?;
    let pool = Pool::default();
    let mut out = vec![W::ZERO; (range.end - range.start) as usize];
    // Block by block, because controls are defined on blocks.
    let mut at = range.start;
    while at < range.end {
        let end = ((at / BLOCK + 1) * BLOCK).min(range.end);
        let into = (at - range.start) as usize..(end - range.start) as usize;
        let mut readers: Vec<Reader<'_, W>> = Vec::with_capacity(terms.len());
        for term in &terms {
            readers.push(term.open::<W>(at..end, &pool)?);
        }
        for (i, reader) in readers.iter_mut().enumerate() {
            reader.add(level, &mut out[into.clone()], at..end, i == 0)?;
        }
        at = end;
    }
    Ok(out)
}

/// What stored vectors say their f32 values leave out of [`values`]: places, counted from the start of the range, and what is to be added
/// there in f64, as [`corrected`](crate::vector::wide::corrected) does.
///
/// # Errors
/// As [`measure`].
pub fn corrections(
    terms: &[TermPlan],
    name: &str,
    elements: u64,
    range: std::ops::Range<u64>,
    operands: Operands<'_>,
) -> Result<Vec<(u64, f64)>> {
    let mut terms: Vec<Term> = terms.iter().map(|t| operands.term(t, name, elements)).collect::<Result<_>>()?;
    terms.retain(Term::has_corrections);
    if terms.is_empty() {
        return Ok(Vec::new());
    }
    let pool = Pool::default();
    let (mut found, mut here) = (Vec::new(), Vec::new());
    for block in range.start / BLOCK..range.end.min(elements).div_ceil(BLOCK) {
        let span = block * BLOCK..((block + 1) * BLOCK).min(elements);
        let readers: Vec<Reader<'_, f32>> = terms.iter().map(|t| t.open(span.clone(), &pool)).collect::<Result<_>>()?;
        gather_corrections(&readers, block, &mut here)?;
        let places = here.iter().map(|&(at, lo)| (span.start + u64::from(at), lo));
        found.extend(places.filter(|(at, _)| range.contains(at)).map(|(at, lo)| (at - range.start, lo)));
    }
    Ok(found)
}

/// The digests of tensors on disk, in one pass.
///
/// # Errors
/// [`Error::Io`], [`Error::Cancelled`].
pub fn digests(
    tensors: &[&TensorView],
    algorithm: Algorithm,
    settings: &Settings,
    control: &Control,
) -> Result<Vec<Option<String>>> {
    let read = tensors.iter().any(|t| t.map().windows_are_read());
    let per_block = if read { BLOCK * 8 } else { 1 };
    let budget = Budget::share(settings.memory_budget, settings.threads(), 0, per_block, 1);
    let grid = Grid::new(tensors.iter().map(|t| t.elements()).collect(), budget.blocks_per_tile);
    let slots: Vec<Mutex<Vec<BlockHash>>> =
        tensors.iter().map(|t| Mutex::new(vec![[0; 32]; t.elements().div_ceil(BLOCK) as usize])).collect();
    control.expect(tensors.iter().map(|t| t.entry.end - t.entry.begin).sum());
    pass::run(
        &grid,
        budget.threads,
        control,
        Pool::default,
        |tile| tensors[tile.tensor].prefetch(tile.elements.clone()),
        |pool, _, tile| {
            let tensor = tensors[tile.tensor];
            for (block, range) in tile.blocks() {
                let hash = algorithm.hash(&tensor.window(range, pool)?);
                slots[tile.tensor].lock().unwrap_or_else(PoisonError::into_inner)[block as usize] = hash;
            }
            control.advance((tile.elements.end - tile.elements.start) * tensor.dtype().size() as u64);
            Ok(())
        },
    )?;
    Ok(slots.into_iter().map(|s| algorithm.digest(&s.into_inner().unwrap_or_else(PoisonError::into_inner))).collect())
}

/// Checks every part of a vector folder against its manifest.
///
/// # Errors
/// [`Error::Damage`] for the first part that differs.
pub fn verify_vector(vector: &VectorFolder, settings: &Settings, control: &Control) -> Result<()> {
    let Some(data) = &vector.data else { return Ok(()) };
    if vector.algorithm == Algorithm::None {
        return Ok(());
    }
    let parts: Vec<_> = vector.rows.iter().flat_map(|r| r.parts.values()).filter(|p| p.digest.is_some()).collect();
    let views: Vec<TensorView> = parts.iter().map(|p| data.tensor(&p.entry)).collect::<Result<_>>()?;
    let found = digests(&views.iter().collect::<Vec<_>>(), vector.algorithm, settings, control)?;
    for ((part, view), found) in parts.iter().zip(&views).zip(found) {
        if part.digest != found {
            return Err(Error::damage(
                view.map().path(),
                format!(
                    "{:?} has the digest {}, its manifest says {}; the file was damaged after it was written: extract the vector again or restore it",
                    part.entry,
                    found.unwrap_or_default(),
                    part.digest.clone().unwrap_or_default()
                ),
            ));
        }
    }
    Ok(())
}

/// How a tensor differs between two checkpoints.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Difference {
    /// The tensor.
    pub name: String,
    /// Elements whose bits differ.
    pub differing: u64,
    /// The first of them.
    pub first: Option<u64>,
}

/// Exact counts of what differs between tensors of the same format and shape.
///
/// # Errors
/// [`Error::Mismatch`] if a pair differs in format or shape; [`Error::Io`], [`Error::Cancelled`].
pub fn diff(
    a: &Checkpoint,
    b: &Checkpoint,
    names: &[String],
    settings: &Settings,
    control: &Control,
) -> Result<Vec<Difference>> {
    let mut pairs = Vec::with_capacity(names.len());
    for name in names {
        let (x, y) = (a.tensor(name)?, b.tensor(name)?);
        if x.dtype() != y.dtype() || x.entry.shape != y.entry.shape {
            return Err(Error::mismatch(
                name,
                format!(
                    "{} {:?} in {}, {} {:?} in {}",
                    x.dtype(),
                    x.entry.shape,
                    a.path().display(),
                    y.dtype(),
                    y.entry.shape,
                    b.path().display()
                ),
            ));
        }
        pairs.push((x, y));
    }
    let grid = Grid::new(pairs.iter().map(|(x, _)| x.elements()).collect(), 1);
    let budget = Budget::share(settings.memory_budget, settings.threads(), 0, BLOCK * 16, 1);
    let counts: Vec<Mutex<(u64, Option<u64>)>> = pairs.iter().map(|_| Mutex::new((0, None))).collect();
    control.expect(pairs.iter().map(|(x, _)| 2 * (x.entry.end - x.entry.begin)).sum());
    pass::run(
        &grid,
        budget.threads,
        control,
        Pool::default,
        |tile| {
            pairs[tile.tensor].0.prefetch(tile.elements.clone());
            pairs[tile.tensor].1.prefetch(tile.elements.clone());
        },
        |pool, _, tile| {
            let (x, y) = &pairs[tile.tensor];
            let size = x.dtype().size();
            let (x, y) = (x.window(tile.elements.clone(), pool)?, y.window(tile.elements.clone(), pool)?);
            control.advance(2 * x.len() as u64);
            if *x == *y {
                return Ok(());
            }
            let mut differing = 0;
            let mut first = None;
            for (i, (x, y)) in x.chunks_exact(size).zip(y.chunks_exact(size)).enumerate() {
                if x != y {
                    differing += 1;
                    first.get_or_insert(tile.elements.start + i as u64);
                }
            }
            let mut count = counts[tile.tensor].lock().unwrap_or_else(PoisonError::into_inner);
            count.0 += differing;
            count.1 = match (count.1, first) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            };
            Ok(())
        },
    )?;
    Ok(counts
        .into_iter()
        .zip(names)
        .map(|(c, name)| {
            let (differing, first) = c.into_inner().unwrap_or_else(PoisonError::into_inner);
            Difference { name: name.clone(), differing, first }
        })
        .collect())
}
