//! Making a vector folder: one pass over the donors, encoded, checked element by element, and written in order.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use super::assembly::{Assembly, Pending, RUN, Tensor};
use super::encode::{Choice, Codec, Packed, SAMPLE, Sample};
use super::format::{CONFIG, Encoding, Row, VERSION};
use super::lowrank;
use super::moved::Moved;
use super::wide::correction;
use crate::bf16::{Element, Work};
use crate::dtype::Dtype;
use crate::operand::{Placement, Reader, Source, Substitute, Term, Typed, first_nonfinite, gather_corrections};
use crate::plan::{Operands, Ref, Settings, TermPlan, dtype, elements, noises, scale_noise};
use crate::simd::Level;
use crate::simd::dispatch::{self, MICRO, with_element};
use crate::store::map::Pool;
use crate::store::writer::write_whole;
use crate::store::{Algorithm, TensorView};
use crate::stream::{BLOCK, Budget, Control, Grid, Line, Tile, pass};
use crate::{Error, Result};

/// A vector to write.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ExtractPlan {
    /// The folder. It exists.
    pub out: PathBuf,
    /// The digest of what is stored.
    #[serde(default = "crate::plan::default_algorithm")]
    pub digest: Algorithm,
    /// Which encodings are allowed.
    pub encoding: Choice,
    /// Bytes after which a file is full.
    pub shard_bytes: u64,
    /// Whether NaN and infinity may pass.
    #[serde(default)]
    pub allow_nonfinite: bool,
    /// The tensors.
    pub tensors: Vec<ExtractTensor>,
    /// What else the manifest says; its own keys come first.
    #[serde(default)]
    pub config: serde_json::Map<String, serde_json::Value>,
    /// How to run.
    #[serde(flatten)]
    pub settings: Settings,
}

/// One tensor of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ExtractTensor {
    /// Its name.
    pub name: String,
    /// The donors' format: what a rebuilt tensor has.
    pub dtype: String,
    /// Its shape.
    pub shape: Vec<u64>,
    /// Its value. When it is the plain difference of two tensors, the rebuild is checked.
    #[serde(default)]
    pub terms: Vec<TermPlan>,
    /// Tensors that must be equal, for integers and booleans: the vector is zero there.
    #[serde(default)]
    pub equal: Vec<Ref>,
    /// u, s and v of a checkpoint, which are stored in place of the value, with the norm of what they leave out; empty for a rank of zero.
    #[serde(default)]
    pub factors: Option<Vec<Ref>>,
}

/// What stands in place of a tensor's value.
struct Factors {
    parts: Vec<TensorView>,
    /// None for a rank of zero.
    product: Option<Term>,
}

struct Job {
    name: String,
    shape: Vec<u64>,
    dtype: Dtype,
    elements: u64,
    terms: Vec<Term>,
    equal: Vec<TensorView>,
    double: bool,
    rebuild: bool,
    factors: Option<Factors>,
    /// Chosen when its first tile is made, and let go with its last: a palette is large, and there are many tensors.
    codec: Mutex<Option<Arc<Codec>>>,
}

impl Job {
    fn row(&self) -> Row {
        Row {
            name: self.name.clone(),
            shape: self.shape.clone(),
            dtype: self.dtype.name().into(),
            encoding: Encoding::Zero,
            elements: self.elements,
            moved: 0,
            norm: Some(0.0),
            max: Some(0.0),
            max_at: None,
            inexact: 0,
            wide: 0,
            rank: None,
            residual: None,
            bytes: 0,
            parts: Default::default(),
        }
    }

    fn bytes(&self) -> u64 {
        let sources = self.terms.iter().flat_map(Term::sources);
        sources
            .map(|s| s.stored_bytes() + s.tensors().iter().map(|t| t.entry.end - t.entry.begin).sum::<u64>())
            .sum::<u64>()
            + self.equal.iter().chain(self.parts()).map(|t| t.entry.end - t.entry.begin).sum::<u64>()
    }

    /// The parts of a low-rank tensor.
    fn parts(&self) -> &[TensorView] {
        self.factors.as_ref().map_or(&[], |f| &f.parts)
    }
}

fn factors(t: &ExtractTensor, refs: &[Ref], operands: Operands<'_>) -> Result<Factors> {
    let parts: Vec<TensorView> = refs.iter().map(|r| operands.tensor(r)).collect::<Result<_>>()?;
    let wrong = |problem: String| Error::mismatch(&t.name, problem);
    let product = match parts.as_slice() {
        [] => None,
        [u, s, v] => {
            let product = lowrank::product([u.clone(), s.clone(), v.clone()], &t.shape).map_err(|e| match e {
                Error::Usage(problem) => wrong(problem),
                other => other,
            })?;
            Some(Term::new(1.0, Source::Product(Arc::new(product))))
        }
        _ => return Err(wrong(format!("factors are u, s and v, found {} tensors", parts.len()))),
    };
    Ok(Factors { parts, product })
}

fn prepare(plan: &ExtractPlan, operands: Operands<'_>) -> Result<Vec<Job>> {
    crate::plan::distinct(plan.tensors.iter().map(|t| t.name.as_str()))?;
    let mut jobs = Vec::with_capacity(plan.tensors.len());
    for t in &plan.tensors {
        let dtype = dtype(&t.dtype, &t.name)?;
        let elements = elements(&t.shape, &t.name)?;
        let mut terms: Vec<Term> =
            t.terms.iter().map(|term| operands.term(term, &t.name, elements)).collect::<Result<_>>()?;
        let factors = t.factors.as_ref().map(|refs| factors(t, refs, operands)).transpose()?;
        let stored = factors.iter().filter_map(|f| f.product.as_ref());
        let double = terms.iter().chain(stored).any(Term::is_double);
        terms.retain(|t| !t.is_zero());
        let equal: Vec<TensorView> = t.equal.iter().map(|r| operands.tensor(r)).collect::<Result<_>>()?;
        if equal.iter().any(|e| e.entry.shape != t.shape || e.dtype() != dtype) {
            return Err(Error::mismatch(&t.name, "tensors that must be equal differ in format or shape"));
        }
        if (!terms.is_empty() || factors.is_some()) && !dtype.is_float() {
            return Err(Error::mismatch(&t.name, format!("a difference of {dtype} is not defined")));
        }
        let rebuild = match terms.as_slice() {
            [Term { coefficient: 1.0, placement: Placement::Whole(Source::Difference(p, _)), substitute: None }] => {
                p.dtype() == dtype
            }
            _ => false,
        };
        let rebuild = rebuild && factors.is_none();
        let codec = Mutex::new(factors.as_ref().map(|_| Arc::new(Codec::LowRank)));
        jobs.push(Job {
            name: t.name.clone(),
            shape: t.shape.clone(),
            dtype,
            elements,
            terms,
            equal,
            double,
            rebuild,
            factors,
            codec,
        });
    }
    Ok(jobs)
}

/// What a vector folder says of itself.
#[derive(Debug, Serialize)]
pub struct Manifest {
    format: u32,
    reasonvec: &'static str,
    digest: Algorithm,
    #[serde(flatten)]
    config: serde_json::Map<String, serde_json::Value>,
    /// The tensors.
    pub tensors: Vec<Row>,
}

/// Writes a vector folder, its manifest last.
///
/// # Errors
/// [`Error::Mismatch`] before anything is written, if the operands do not fit; then [`Error::Io`], [`Error::NonFinite`], [`Error::Cancelled`]. Nothing half-made
/// keeps a name.
pub fn extract(plan: &ExtractPlan, operands: Operands<'_>, control: &Control) -> Result<Manifest> {
    let level = Level::current()?;
    let mut jobs = prepare(plan, operands)?;
    operands.verify_vectors(&plan.settings, control)?;
    let noises = jobs.iter_mut().flat_map(|j| noises(&j.name, j.elements, j.double, &mut j.terms)).collect();
    scale_noise(noises, plan.allow_nonfinite, &plan.settings, control)?;
    let assembly = Assembly::new(
        &plan.out,
        plan.digest,
        plan.settings.sync,
        plan.shard_bytes,
        jobs.iter().map(|j| j.name.as_str()),
    );
    let per_block = jobs.iter().map(block_memory).max().unwrap_or(1);
    // Scratch, the sample, and of bitmap and values what grows and what is being written.
    let fixed = (MICRO * 32) as u64 + (1 << 16) * 5 + 4 * RUN as u64;
    let budget = Budget::share(plan.settings.memory_budget, plan.settings.threads(), fixed, per_block, 1);
    let run = Run {
        plan,
        level,
        control,
        grid: Grid::new(jobs.iter().map(|j| j.elements).collect(), budget.blocks_per_tile),
        jobs: &jobs,
        assembly: Mutex::new(assembly),
        line: Line::new(budget.threads),
        spare: Mutex::default(),
    };
    control.expect(jobs.iter().map(Job::bytes).sum());
    let passed = pass::run(
        &run.grid,
        budget.threads,
        control,
        Scratch::default,
        |tile| jobs[tile.tensor].terms.iter().for_each(|t| t.prefetch(tile.elements.clone())),
        |scratch, number, tile| {
            let result = run.tile(scratch, number, tile);
            if result.is_err() {
                run.line.give_up();
            }
            result
        },
    );
    let assembly = run.assembly.into_inner().unwrap_or_else(PoisonError::into_inner);
    if let Err(e) = passed {
        assembly.discard();
        return Err(e);
    }
    let manifest = Manifest {
        format: VERSION,
        reasonvec: env!("CARGO_PKG_VERSION"),
        digest: plan.digest,
        config: plan.config.clone(),
        tensors: assembly.finish()?,
    };
    let text = serde_json::to_string_pretty(&manifest).map_err(|e| Error::Usage(e.to_string()))? + "\n";
    write_whole(&plan.out.join(CONFIG), text.as_bytes(), plan.settings.sync)?;
    Ok(manifest)
}

/// Bytes that a worker holds per block of a tile: bitmap, values with every element escaped, and the buffers of what it reads.
fn block_memory(job: &Job) -> u64 {
    let work = if job.double { 8 } else { 4 };
    let read: u64 = job.terms.iter().map(|t| t.memory().0).sum();
    let scratch: u64 = job.terms.iter().map(|t| t.memory().1).sum();
    let by_block = if job.terms.iter().any(Term::by_block) { work * BLOCK } else { 0 };
    let product = job.factors.as_ref().and_then(|f| f.product.as_ref());
    // What is stored beside what it stands for.
    let product = product.map_or(0, |p| p.memory().1) + if job.factors.is_some() { 2 * work * BLOCK } else { 0 };
    // What is encoded waits for its turn while the next tile is.
    let packed = 2 * ((work + 1) * BLOCK + BLOCK / 8);
    packed + read * BLOCK + scratch + by_block + product
}

#[derive(Default)]
struct Scratch {
    pool: Pool,
    sample: Sample,
    single: Buffers<f32>,
    double: Buffers<f64>,
    rebuilt: Vec<u8>,
    corrections: Vec<(u32, f64)>,
}

/// The buffers of one work type.
#[derive(Default)]
struct Buffers<W> {
    update: Vec<W>,
    moved: Moved<W>,
}

struct Run<'a> {
    plan: &'a ExtractPlan,
    level: Level,
    control: &'a Control,
    grid: Grid,
    jobs: &'a [Job],
    assembly: Mutex<Assembly<'a>>,
    line: Line<Ready>,
    /// Emptied, for workers whose tiles wait in line.
    spare: Mutex<Vec<Packed>>,
}

/// A tile that is encoded; one of a tensor of zeros has no codec.
struct Ready {
    tile: Tile,
    packed: Packed,
    codec: Option<Arc<Codec>>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<'a> Run<'a> {
    fn tile(&self, scratch: &mut Scratch, number: usize, tile: &Tile) -> Result<()> {
        let job = &self.jobs[tile.tensor];
        let Scratch { pool, sample, single, double, rebuilt, corrections } = scratch;
        let mut packed = lock(&self.spare).pop().unwrap_or_default();
        let codec = if let Some(factors) = &job.factors {
            if job.double {
                self.measure(job, factors, tile, pool, double, &mut packed)?;
            } else {
                self.measure(job, factors, tile, pool, single, &mut packed)?;
            }
            lock(&job.codec).clone()
        } else if job.terms.is_empty() {
            self.check_equal(job, tile, pool)?;
            None
        } else if job.double {
            let codec = self.codec(job, pool, sample, double)?;
            with_element!(job.dtype, E => self.encode::<E, f64>(job, tile, &codec, pool, double, rebuilt, corrections, &mut packed)?);
            Some(codec)
        } else {
            let codec = self.codec(job, pool, sample, single)?;
            with_element!(job.dtype, E => self.encode::<E, f32>(job, tile, &codec, pool, single, rebuilt, corrections, &mut packed)?);
            Some(codec)
        };
        let ready = Ready { tile: tile.clone(), packed, codec };
        self.line.join(number, ready, self.control, |ready| self.assemble(ready))?;
        if job.elements > 0 {
            let share = job.bytes() as u128 * (tile.elements.end - tile.elements.start) as u128 / job.elements as u128;
            self.control.advance(share as u64);
        }
        Ok(())
    }

    /// Adds the next tile to the files.
    fn assemble(&self, ready: Ready) -> Result<()> {
        let Ready { tile, mut packed, codec } = ready;
        let job = &self.jobs[tile.tensor];
        let last = tile.elements.end == job.elements;
        let mut assembly = lock(&self.assembly);
        let mut pending = None;
        if let Some(codec) = codec {
            if tile.elements.start == 0 {
                assembly.begin(Tensor { row: job.row(), codec, double: job.double, factors: job.parts() })?;
            }
            pending = assembly.add(&packed, last)?;
            if last {
                assembly.end()?;
                lock(&job.codec).take();
            }
        } else if last {
            assembly.zero(job.row());
        }
        drop(assembly);
        packed.clear();
        lock(&self.spare).push(packed);
        pending.map_or(Ok(()), Pending::write)
    }

    fn check_equal(&self, job: &Job, tile: &Tile, pool: &Pool) -> Result<()> {
        let Some((first, others)) = job.equal.split_first() else { return Ok(()) };
        let a = first.window(tile.elements.clone(), pool)?;
        for other in others {
            let b = other.window(tile.elements.clone(), pool)?;
            if *a != *b {
                let byte = a.iter().zip(b.iter()).position(|(x, y)| x != y).unwrap_or(0);
                return Err(Error::mismatch(
                    &job.name,
                    format!(
                        "a difference of {} is not defined, and element {} differs between {} and {}; leave the tensor out with --exclude",
                        job.dtype,
                        tile.elements.start + (byte / job.dtype.size()) as u64,
                        first.map().path().display(),
                        other.map().path().display()
                    ),
                ));
            }
        }
        Ok(())
    }

    /// The tensor's codec: chosen once, from an even sample, by whichever worker needs it first.
    fn codec<W: Work>(
        &self,
        job: &Job,
        pool: &Pool,
        sample: &mut Sample,
        buffers: &mut Buffers<W>,
    ) -> Result<Arc<Codec>> {
        let mut chosen = lock(&job.codec);
        if let Some(codec) = &*chosen {
            return Ok(codec.clone());
        }
        let Buffers { update: buffer, moved } = buffers;
        // A shuffle is defined on whole blocks, and has mixed what is in them.
        let shuffled = job.terms.iter().any(|t| matches!(t.substitute, Some(Substitute::Shuffle { .. })));
        let span = if shuffled { BLOCK } else { MICRO as u64 };
        let spans = job.elements.div_ceil(span);
        let taken = spans.min((SAMPLE / span).max(1));
        buffer.resize(buffer.len().max(span as usize), W::ZERO);
        for k in 0..taken {
            let start = k * spans / taken * span;
            let range = start..(start + span).min(job.elements);
            let u = &mut buffer[..(range.end - range.start) as usize];
            let mut readers = open(&job.terms, range.clone(), pool)?;
            accumulate(&mut readers, self.level, u, range)?;
            for u in u.chunks(MICRO) {
                moved.take(self.level, u);
                sample.look(u.len(), moved.values());
            }
        }
        Ok(chosen.insert(Arc::new(sample.choose(self.plan.encoding, job.double))).clone())
    }

    /// Looks at what a low-rank tensor holds, and at what it leaves out.
    fn measure<W: Work>(
        &self,
        job: &Job,
        factors: &Factors,
        tile: &Tile,
        pool: &Pool,
        buffers: &mut Buffers<W>,
        packed: &mut Packed,
    ) -> Result<()> {
        let level = self.level;
        let stored = factors.product.as_slice();
        let mut readers =
            [open::<W>(stored, tile.elements.clone(), pool)?, open(&job.terms, tile.elements.clone(), pool)?];
        let Buffers { update: buffer, moved } = buffers;
        buffer.resize(2 * BLOCK as usize, W::ZERO);
        for (_, block) in tile.blocks() {
            let n = (block.end - block.start) as usize;
            let (x, y) = buffer.split_at_mut(BLOCK as usize);
            for (readers, into) in readers.iter_mut().zip([&mut x[..n], &mut y[..n]]) {
                into.fill(W::ZERO);
                accumulate(readers, level, into, block.clone())?;
            }
            let (mut squares, mut residual) = (0.0, 0.0);
            for (i, (x, y)) in x[..n].chunks(MICRO).zip(y[..n].chunks_mut(MICRO)).enumerate() {
                let from = block.start + (i * MICRO) as u64;
                moved.take(level, x);
                let finite = packed.measure(level, moved, from);
                y.iter_mut().zip(x).for_each(|(y, &x)| *y = *y - x);
                let left_out = dispatch::dot(level, y, y);
                let sound = finite && left_out.is_finite();
                if !sound && !self.plan.allow_nonfinite {
                    for terms in [stored, &job.terms] {
                        let range = from..from + x.len() as u64;
                        if let Some(e) = first_nonfinite::<W>(&job.name, &[], terms, level, range, pool)? {
                            return Err(e);
                        }
                    }
                }
                squares += moved.squares(level);
                residual += left_out;
            }
            packed.squares.push(squares);
            packed.residual.push(residual);
            packed.counts.push([0; 3]);
        }
        Ok(())
    }

    #[allow(clippy::too_many_arguments, reason = "the scratch of a worker, piece by piece")]
    fn encode<E: Element, W: Work>(
        &self,
        job: &Job,
        tile: &Tile,
        codec: &Codec,
        pool: &Pool,
        buffers: &mut Buffers<W>,
        rebuilt: &mut Vec<u8>,
        corrections: &mut Vec<(u32, f64)>,
        packed: &mut Packed,
    ) -> Result<()> {
        let level = self.level;
        let mut readers = open::<W>(&job.terms, tile.elements.clone(), pool)?;
        let span = if job.terms.iter().any(Term::by_block) { BLOCK } else { MICRO as u64 };
        let Buffers { update: buffer, moved } = buffers;
        buffer.resize(buffer.len().max(span as usize), W::ZERO);
        rebuilt.resize(MICRO * E::SIZE, 0);
        let sparse = !matches!(codec, Codec::Dense);
        // Two donors of one format, few of whose elements differ: what does tells the rest.
        let few_differ = sparse && job.rebuild && negative_dtype(&job.terms[0]) == Some(job.dtype);
        for (number, block) in tile.blocks() {
            let (mut squares, before) = (0.0, (packed.moved, packed.escapes.len(), packed.wide_at.len()));
            for part in spans(block.clone(), span) {
                let buffer = &mut buffer[..(part.end - part.start) as usize];
                if !few_differ {
                    accumulate(&mut readers, level, buffer, part.clone())?;
                }
                for (i, u) in buffer.chunks_mut(MICRO).enumerate() {
                    let from = part.start + (i * MICRO) as u64;
                    let range = from..from + u.len() as u64;
                    let donors = if job.rebuild { readers[0].donors(&range) } else { None };
                    let leads_back = match donors {
                        Some([p, n]) if few_differ => {
                            let leads_back = moved.compare::<E>(level, p.1, n.1);
                            if leads_back != Some(true) {
                                dispatch::difference::<E, W>(level, u, p.1, n.1, W::from_f64(1.0), true);
                            }
                            leads_back
                        }
                        _ => None,
                    };
                    if leads_back.is_none() {
                        moved.take(level, u);
                    }
                    if !packed.measure(level, moved, from)
                        && !self.plan.allow_nonfinite
                        && let Some(e) = first_nonfinite::<W>(&job.name, &[], &job.terms, level, range, pool)?
                    {
                        return Err(e);
                    }
                    squares += moved.squares(level);
                    packed.pack(level, codec, if sparse { moved.values() } else { u }, moved.bits());
                    if let (Some(donors), false) = (donors, leads_back == Some(true)) {
                        prove::<E, W>(packed, level, donors, u, rebuilt, (from - block.start) as u32);
                    }
                }
            }
            // Stored vectors bring corrections along; a difference of two tensors makes its own.
            gather_corrections(&readers, number, corrections)?;
            for (at, lo) in corrections.iter() {
                packed.wide_at.extend_from_slice(&at.to_le_bytes());
                packed.wide_lo.extend_from_slice(&lo.to_le_bytes());
            }
            packed.squares.push(squares);
            packed.counts.push([
                packed.moved - before.0,
                ((packed.escapes.len() - before.1) / 4) as u64,
                ((packed.wide_at.len() - before.2) / 4) as u64,
            ]);
        }
        Ok(())
    }
}

fn spans(elements: Range<u64>, length: u64) -> impl Iterator<Item = Range<u64>> {
    let end = elements.end;
    elements.step_by(length as usize).map(move |at| at..(at + length).min(end))
}

fn open<'t, W: Work>(terms: &'t [Term], elements: Range<u64>, pool: &'t Pool) -> Result<Vec<Reader<'t, W>>> {
    terms.iter().map(|t| t.open::<W>(elements.clone(), pool)).collect()
}

fn accumulate<W: Work>(
    readers: &mut [Reader<'_, W>],
    level: Level,
    into: &mut [W],
    elements: Range<u64>,
) -> Result<()> {
    for (i, reader) in readers.iter_mut().enumerate() {
        reader.add(level, into, elements.clone(), i == 0)?;
    }
    Ok(())
}

fn negative_dtype(term: &Term) -> Option<Dtype> {
    match &term.placement {
        Placement::Whole(Source::Difference(_, n)) => Some(n.dtype()),
        _ => None,
    }
}

/// Rebuilds the positive donor of at most MICRO elements, and records what it takes besides the difference. `rebuilt` is scratch.
fn prove<E: Element, W: Work>(
    packed: &mut Packed,
    level: Level,
    [(dtype, p), n]: [Typed<'_>; 2],
    u: &[W],
    rebuilt: &mut [u8],
    from: u32,
) {
    let out = &mut rebuilt[..u.len() * E::SIZE];
    if n.0 == dtype {
        if dispatch::rebuilds::<E, W>(level, p, n.1, u) {
            return;
        }
        dispatch::finish::<E, W>(level, out, n.1, u);
    } else {
        let mut wide = [W::ZERO; MICRO];
        let wide = &mut wide[..u.len()];
        with_element!(n.0, N => dispatch::widen::<N, W>(level, wide, n.1));
        dispatch::finish_as::<E, W>(level, out, wide, u);
    }
    if out != p {
        correct::<E, W>(packed, out, p, n, u, from);
    }
}

/// Records what the rebuilt elements that differ from the positive donor need.
fn correct<E: Element, W: Work>(packed: &mut Packed, rebuilt: &[u8], p: &[u8], n: Typed<'_>, u: &[W], from: u32) {
    for (i, hi) in u.iter().enumerate() {
        let at = i * E::SIZE..(i + 1) * E::SIZE;
        let (is, should) = (E::load(&rebuilt[at.clone()]), E::load(&p[at]));
        // A NaN that was let through stays a NaN; which one is not kept.
        if is.same_bits(should) || should.widen64().is_nan() {
            continue;
        }
        let negative = with_element!(n.0, N => N::load(&n.1[i * N::SIZE..]).widen64());
        let lo = if size_of::<W>() == 4 { correction(should, negative, hi.to_f64()) } else { None };
        match lo {
            Some(lo) => {
                packed.wide_at.extend_from_slice(&(from + i as u32).to_le_bytes());
                packed.wide_lo.extend_from_slice(&lo.to_le_bytes());
            }
            None => packed.inexact += 1,
        }
    }
}
