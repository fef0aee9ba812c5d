//! The linear family: `out = target + sum of coefficient * vector`, one pass.
//!
//! Every tile is read once, combined in L1, rounded once, reported, digested while it is in cache, and written to where it belongs in a shard
//! that was laid out before. Tensors that do not change are copied by the kernel.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::bf16::{Element, Work};
use crate::dtype::{Class, Dtype};
use crate::operand::{Reader, Term, first_nonfinite, gather_corrections};
use crate::plan::{Operands, Ref, Settings, TermPlan, dtype, elements, noises, scale_noise};
use crate::simd::dispatch::{self, MICRO, Rounding, with_element};
use crate::simd::Level;
use crate::store::digest::BlockHash;
use crate::store::header::Header;
use crate::store::journal::Journal;
use crate::store::map::{FileMap, Pool};
use crate::store::writer::{self, Writer};
use crate::store::{Algorithm, TensorView};
use crate::stream::{BLOCK, Budget, Control, Grid, Tile, pass};
use crate::vector::wide::corrected;
use crate::{Error, Result};

/// A whole output.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ApplyPlan {
    /// The folder to write into. It exists.
    pub out: PathBuf,
    /// The digest of inputs and outputs.
    #[serde(default = "crate::plan::default_algorithm")]
    pub digest: Algorithm,
    /// Whether NaN and infinity may pass.
    #[serde(default)]
    pub allow_nonfinite: bool,
    /// The files to write.
    pub shards: Vec<ShardPlan>,
    /// How to run.
    #[serde(flatten)]
    pub settings: Settings,
}

/// One file.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ShardPlan {
    /// Its name.
    pub file: String,
    /// The shard whose header it keeps byte for byte, as (operand, file); none when a format changes.
    #[serde(default)]
    pub header_of: Option<(usize, String)>,
    /// The header's JSON text, kept byte for byte.
    #[serde(default)]
    pub header_text: Option<String>,
    /// `__metadata__`, for a header that is made anew.
    #[serde(default)]
    pub metadata: Vec<(String, String)>,
    /// Its tensors, in the order of their bytes.
    pub tensors: Vec<TensorPlan>,
}

/// One tensor.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TensorPlan {
    /// Its name.
    pub name: String,
    /// Its format.
    pub dtype: String,
    /// Its shape.
    pub shape: Vec<u64>,
    /// What is added to; zero if nothing.
    #[serde(default)]
    pub target: Option<Ref>,
    /// What is added.
    #[serde(default)]
    pub terms: Vec<TermPlan>,
    /// Tensors that must equal the target bit for bit (integers, booleans).
    #[serde(default)]
    pub equal: Vec<Ref>,
}

/// What became of a tensor.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Done {
    /// Its name.
    pub name: String,
    /// Its file.
    pub file: String,
    /// Its digest.
    pub digest: Option<String>,
    /// Digests of what it was made of, as far as that was read element for element.
    pub inputs: Vec<(usize, String, Option<String>)>,
    /// The rounding report: intended, realised and dot as f64 bits (JSON has no infinities), then counts. `None` for a copy.
    rounding: Option<[u64; 5]>,
}

impl Done {
    /// The rounding report.
    pub fn rounding(&self) -> Option<Rounding> {
        self.rounding.map(|[intended, realised, dot, updated, lost]| Rounding {
            intended: f64::from_bits(intended),
            realised: f64::from_bits(realised),
            dot: f64::from_bits(dot),
            updated,
            lost,
        })
    }
}

/// What a plan will take.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Prediction {
    /// Bytes that will be read.
    pub read: u64,
    /// Bytes that will be written.
    pub written: u64,
    /// The most memory that the workers hold.
    pub memory: u64,
    /// Workers.
    pub threads: usize,
}

struct Job {
    name: String,
    shard: usize,
    offset: u64,
    dtype: Dtype,
    elements: u64,
    target: Option<(Ref, TensorView)>,
    terms: Vec<Term>,
    inputs: Vec<(Ref, TensorView)>,
    equal: Vec<TensorView>,
    double: bool,
    by_block: bool,
    gathered: Mutex<Option<Gathered>>,
}

/// What the tiles of a tensor have said so far.
struct Gathered {
    left: usize,
    out: Vec<BlockHash>,
    inputs: Vec<Vec<BlockHash>>,
    rounding: Vec<Rounding>,
}

struct ShardRun {
    writer: Mutex<Option<std::sync::Arc<Writer>>>,
    left: AtomicUsize,
}

impl Job {
    fn is_copy(&self) -> bool {
        self.terms.is_empty() && self.target.as_ref().is_some_and(|(_, t)| t.dtype() == self.dtype)
    }

    fn bytes_read(&self) -> u64 {
        let size = |t: &TensorView| t.entry.end - t.entry.begin;
        self.inputs.iter().map(|(_, t)| size(t)).sum::<u64>()
            + self.equal.iter().map(size).sum::<u64>()
            + self.terms.iter().flat_map(Term::sources).map(|s| s.stored_bytes()).sum::<u64>()
    }

    fn bytes_written(&self) -> u64 {
        self.elements * self.dtype.size() as u64
    }

    fn memory(&self) -> (u64, u64) {
        let read = |t: &TensorView| if t.map().windows_are_read() { t.dtype().size() as u64 } else { 0 };
        let target = self.target.as_ref().map_or(0, |(_, t)| read(t));
        let equal = self.equal.iter().map(read).sum::<u64>();
        if self.is_copy() {
            return (0, (target + equal) * BLOCK);
        }
        let work = if self.double { 8 } else { 4 };
        let span = if self.by_block { BLOCK } else { MICRO as u64 };
        let (mut fixed, mut per_element) = (span * work, self.dtype.size() as u64 + target + equal);
        for term in &self.terms {
            let (bytes, scratch) = term.memory();
            per_element += bytes;
            fixed += scratch;
        }
        (fixed, per_element * BLOCK)
    }
}

struct Prepared {
    jobs: Vec<Job>,
    headers: Vec<Vec<u8>>,
    lengths: Vec<u64>,
}

fn prepare(plan: &ApplyPlan, operands: Operands<'_>) -> Result<Prepared> {
    let mut jobs = Vec::new();
    let (mut headers, mut lengths) = (Vec::new(), Vec::new());
    for (shard, shard_plan) in plan.shards.iter().enumerate() {
        if !crate::store::checkpoint::is_plain_name(&shard_plan.file) {
            return Err(Error::Usage(format!("{:?} is no plain file name", shard_plan.file)));
        }
        let header = shard_header(shard_plan, operands)?;
        let mut offset = header.len() as u64;
        for tensor in &shard_plan.tensors {
            let job = prepare_tensor(tensor, shard, offset, operands)?;
            offset += job.bytes_written();
            jobs.push(job);
        }
        headers.push(header);
        lengths.push(offset);
    }
    Ok(Prepared { jobs, headers, lengths })
}

fn shard_header(plan: &ShardPlan, operands: Operands<'_>) -> Result<Vec<u8>> {
    let mut listed = Vec::with_capacity(plan.tensors.len());
    let mut size = 0u64;
    for t in &plan.tensors {
        let dtype = dtype(&t.dtype, &t.name)?;
        let sum = size.checked_add(elements(&t.shape, &t.name)? * dtype.size() as u64);
        size = sum.ok_or_else(|| Error::mismatch(&t.name, format!("the tensors of {} overflow", plan.file)))?;
        listed.push((t.name.clone(), dtype, t.shape.clone()));
    }
    let keeps = |header: &Header| {
        header.entries.iter().map(|e| (&e.name, e.dtype, &e.shape)).eq(listed.iter().map(|(n, d, s)| (n, *d, s)))
    };
    let other = || Error::Usage(format!("{}: the plan keeps a header but lays out other tensors", plan.file));
    if let Some(text) = &plan.header_text {
        let header = Header::parse(text, size).map_err(|problem| Error::Usage(format!("{}: {problem}", plan.file)))?;
        if !keeps(&header) {
            return Err(other());
        }
        let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
        bytes.extend(text.as_bytes());
        return Ok(bytes);
    }
    let Some((operand, file)) = &plan.header_of else {
        return Ok(Header::build(&plan.metadata, listed));
    };
    let source = match operands.0.get(*operand) {
        Some(crate::plan::Operand::Checkpoint(c)) => c.shards().iter().find(|s| s.name == *file),
        _ => None,
    };
    let source = source.ok_or_else(|| Error::Usage(format!("the plan keeps the header of {file:?}, which operand {operand} does not have")))?;
    if !keeps(&source.header) {
        return Err(other());
    }
    let mut bytes = vec![0u8; source.header.data_start as usize];
    source.map.read_at(&mut bytes, 0)?;
    Ok(bytes)
}

fn prepare_tensor(plan: &TensorPlan, shard: usize, offset: u64, operands: Operands<'_>) -> Result<Job> {
    let out = dtype(&plan.dtype, &plan.name)?;
    let elements = elements(&plan.shape, &plan.name)?;
    let target = plan.target.as_ref().map(|r| operands.tensor(r).map(|t| (r.clone(), t))).transpose()?;
    if let Some((_, t)) = &target {
        if t.entry.shape != plan.shape {
            return Err(Error::mismatch(&plan.name, format!("the target's shape is {:?}, the plan says {:?}", t.entry.shape, plan.shape)));
        }
        if t.dtype() != out && !(t.dtype().is_float() && out.is_float()) {
            return Err(Error::mismatch(&plan.name, format!("cannot turn {} into {out}", t.dtype())));
        }
        if t.dtype().class() == Class::Refused && !plan.terms.is_empty() {
            return Err(Error::mismatch(&plan.name, format!("is {} in {}; dequantise the checkpoint first", t.dtype(), t.map().path().display())));
        }
    } else if !out.is_float() {
        return Err(Error::mismatch(&plan.name, format!("a tensor of {out} needs a target to be copied from")));
    }
    if !plan.terms.is_empty() && !out.is_float() {
        return Err(Error::mismatch(&plan.name, format!("nothing can be added to {out}; integers and booleans are copied")));
    }
    let mut inputs: Vec<(Ref, TensorView)> = target.iter().cloned().collect();
    let mut terms = Vec::with_capacity(plan.terms.len());
    let mut double = out == Dtype::F64 || target.as_ref().is_some_and(|(_, t)| t.dtype() == Dtype::F64);
    for t in &plan.terms {
        let term = operands.term(t, &plan.name, elements)?;
        // Also of what turns out to add nothing: a zero vector is combined as any other of its format.
        double |= term.is_double();
        if term.is_zero() {
            continue;
        }
        if let (Some(crate::plan::SourcePlan::Difference([p, n])), None) = (&t.source, &t.control) {
            inputs.push((p.clone(), operands.tensor(p)?));
            inputs.push((n.clone(), operands.tensor(n)?));
        } else if let (Some(crate::plan::SourcePlan::Tensor(r)), None) = (&t.source, &t.control) {
            inputs.push((r.clone(), operands.tensor(r)?));
        }
        terms.push(term);
    }
    let mut equal = Vec::new();
    for r in &plan.equal {
        let t = operands.tensor(r)?;
        let same = target.as_ref().is_some_and(|(_, target)| target.dtype() == t.dtype() && target.entry.shape == t.entry.shape);
        if !same {
            return Err(Error::mismatch(&plan.name, format!(
                "{} {:?} in {} must equal the target's, but has another format or shape", t.dtype(), t.entry.shape, t.map().path().display()
            )));
        }
        equal.push(t);
    }
    let by_block = terms.iter().any(Term::by_block);
    Ok(Job {
        name: plan.name.clone(),
        shard,
        offset,
        dtype: out,
        elements,
        target,
        terms,
        inputs,
        equal,
        double,
        by_block,
        gathered: Mutex::new(None),
    })
}

fn share_budget(jobs: &[Job], settings: &Settings) -> Budget {
    let fixed = jobs.iter().map(|j| j.memory().0).max().unwrap_or(0) + (MICRO * 16) as u64;
    let per_block = jobs.iter().map(|j| j.memory().1).max().unwrap_or(0);
    Budget::share(settings.memory_budget, settings.threads(), fixed, per_block.max(1))
}

/// What a plan will read, write and hold, from headers alone; every check that [`apply`] makes before it writes.
///
/// # Errors
/// As [`apply`].
pub fn predict(plan: &ApplyPlan, operands: Operands<'_>) -> Result<Prediction> {
    let prepared = prepare(plan, operands)?;
    let budget = share_budget(&prepared.jobs, &plan.settings);
    Ok(Prediction {
        read: prepared.jobs.iter().map(Job::bytes_read).sum(),
        written: prepared.lengths.iter().sum(),
        memory: budget.bytes,
        threads: budget.threads,
    })
}

/// Writes the shards of a plan. The journal stays: the caller removes it when everything else in the folder is whole.
///
/// # Errors
/// [`Error::Mismatch`] before anything is written, if operands do not fit; then [`Error::Io`], [`Error::NonFinite`], [`Error::Cancelled`], and
/// [`Error::Damage`] for a stored vector whose bytes have changed. No shard that is not whole bears its final name.
pub fn apply(plan: &ApplyPlan, operands: Operands<'_>, control: &Control) -> Result<Vec<Done>> {
    let level = Level::current()?;
    let mut prepared = prepare(plan, operands)?;
    operands.verify_vectors(&plan.settings, control)?;
    let noises = prepared.jobs.iter_mut().flat_map(|j| noises(&j.name, j.elements, j.double, &mut j.terms)).collect();
    scale_noise(noises, plan.allow_nonfinite, &plan.settings, control)?;
    let Prepared { jobs, headers, lengths } = prepared;
    let budget = share_budget(&jobs, &plan.settings);
    let fingerprint = fingerprint(plan, operands)?;

    let (journal, done) = if plan.settings.resume && Journal::exists(&plan.out) {
        let (journal, lines) = Journal::resume::<Done>(&plan.out, &fingerprint)?;
        (journal, still_true(lines, plan, &jobs, control)?)
    } else {
        (Journal::create(&plan.out, &fingerprint)?, HashMap::new())
    };

    let todo: Vec<&Job> = jobs.iter().filter(|j| !done.contains_key(&j.name)).collect();
    let mut shards = Vec::with_capacity(plan.shards.len());
    for (i, shard) in plan.shards.iter().enumerate() {
        let left = todo.iter().filter(|j| j.shard == i).count();
        let path = plan.out.join(&shard.file);
        let partial = writer::partial_of(&path).exists();
        let finished = left == 0 && !shard.tensors.is_empty() && !partial && path.exists();
        let writer = if finished {
            None
        } else {
            if !partial && left < shard.tensors.len() {
                // Some of its tensors are right and some are not (the disk lost lines of the journal, or bytes): what is right stays.
                writer::take_back(&path)?;
            }
            let writer = Writer::create(&path, lengths[i])?;
            writer.write_at(&headers[i], 0)?;
            Some(std::sync::Arc::new(writer))
        };
        shards.push(ShardRun { writer: Mutex::new(writer), left: AtomicUsize::new(left) });
    }

    let run = Run {
        plan,
        level,
        control,
        jobs: &todo,
        grid: Grid::new(todo.iter().map(|j| j.elements).collect(), budget.blocks_per_tile),
        shards: &shards,
        journal: Mutex::new(journal),
        done: Mutex::new(done),
    };
    control.expect(todo.iter().map(|j| j.bytes_read() + j.bytes_written()).sum());
    for (shard, state) in shards.iter().enumerate() {
        // Shards whose tensors were all done when the last run stopped, or that have none.
        if state.left.load(Ordering::Relaxed) == 0 {
            run.finish_shard(shard)?;
        }
    }
    pass::run(
        &run.grid,
        budget.threads,
        control,
        Scratch::default,
        |tile| run.prefetch(tile),
        |scratch, _, tile| run.tile(scratch, tile),
    )?;

    let mut done = run.done.into_inner().unwrap_or_else(PoisonError::into_inner);
    jobs.iter()
        .map(|j| done.remove(&j.name).ok_or_else(|| Error::mismatch(&j.name, "was not written; please report this")))
        .collect()
}

/// What must be equal for a run to be continued: the plan less its settings, and the identity of every input file.
fn fingerprint(plan: &ApplyPlan, operands: Operands<'_>) -> Result<String> {
    let mut files = Vec::new();
    for operand in operands.0 {
        let checkpoint = match operand {
            crate::plan::Operand::Checkpoint(c) => Some(c.as_ref()),
            crate::plan::Operand::Vector(v) => v.data.as_ref(),
        };
        for shard in checkpoint.map_or(&[][..], |c| c.shards()) {
            let path = shard.map.path();
            let meta = std::fs::metadata(path).map_err(|e| Error::io(path, "inspect", e))?;
            let modified = meta.modified().ok().and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok());
            files.push((path.to_path_buf(), meta.len(), modified.map(|d| d.as_nanos().to_string())));
        }
    }
    let text = serde_json::to_vec(&(&plan.digest, plan.allow_nonfinite, &plan.shards, files))
        .map_err(|e| Error::Usage(e.to_string()))?;
    let hash = Algorithm::Xxh3.digest_bytes(&text, 1);
    Ok(hash.unwrap_or_default())
}

/// The journal's lines whose bytes are still what they were: a crash of the machine can lose what a finished write had written.
fn still_true(lines: Vec<Done>, plan: &ApplyPlan, jobs: &[Job], control: &Control) -> Result<HashMap<String, Done>> {
    let by_name: HashMap<&str, &Job> = jobs.iter().map(|j| (j.name.as_str(), j)).collect();
    let mut maps: HashMap<String, Option<std::sync::Arc<FileMap>>> = HashMap::new();
    let mut views = Vec::new();
    for line in lines {
        let Some(job) = by_name.get(line.name.as_str()) else { continue };
        let map = maps.entry(line.file.clone()).or_insert_with(|| {
            let path = plan.out.join(&line.file);
            let partial = writer::partial_of(&path);
            [partial, path].iter().find_map(|p| FileMap::open(p).ok()).map(std::sync::Arc::new)
        });
        if let Some(map) = map {
            if job.offset + job.bytes_written() <= map.len() && line.digest.is_some() {
                views.push((TensorView::at(map, &job.name, job.dtype, job.offset, job.elements), line));
            }
        }
    }
    let tensors: Vec<&TensorView> = views.iter().map(|(v, _)| v).collect();
    let digests = crate::inspect::digests(&tensors, plan.digest, &plan.settings, control)?;
    Ok(views.into_iter().zip(digests).filter(|((_, l), d)| l.digest == *d).map(|((_, l), _)| (l.name.clone(), l)).collect())
}

#[derive(Default)]
struct Scratch {
    pool: Pool,
    out: Vec<u8>,
    single: Vec<f32>,
    double: Vec<f64>,
    corrections: Vec<(u32, f64)>,
}

struct Run<'a> {
    plan: &'a ApplyPlan,
    level: Level,
    control: &'a Control,
    jobs: &'a [&'a Job],
    grid: Grid,
    shards: &'a [ShardRun],
    journal: Mutex<Journal>,
    done: Mutex<HashMap<String, Done>>,
}

/// What one tile adds to what its tensor has gathered.
struct TileResult {
    first_block: usize,
    out: Vec<BlockHash>,
    inputs: Vec<Vec<BlockHash>>,
    rounding: Vec<Rounding>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Run<'_> {
    fn prefetch(&self, tile: &Tile) {
        let job = self.jobs[tile.tensor];
        if let Some((_, target)) = &job.target {
            target.prefetch(tile.elements.clone());
        }
        for term in &job.terms {
            term.prefetch(tile.elements.clone());
        }
    }

    fn tile(&self, scratch: &mut Scratch, tile: &Tile) -> Result<()> {
        let job = self.jobs[tile.tensor];
        let writer = lock(&self.shards[job.shard].writer).clone();
        let writer = writer.ok_or_else(|| Error::mismatch(&job.name, "its shard was closed too early; please report this"))?;
        let Scratch { pool, out, single, double, corrections } = scratch;
        let result = if job.is_copy() {
            self.copy_tile(job, tile, &writer, pool)?
        } else {
            out.resize((tile.elements.end - tile.elements.start) as usize * job.dtype.size(), 0);
            let result = with_element!(job.dtype, O => if job.double {
                self.combine_tile::<O, f64>(job, tile, pool, out, double, corrections)?
            } else {
                self.combine_tile::<O, f32>(job, tile, pool, out, single, corrections)?
            });
            writer.write_at(out, job.offset + tile.elements.start * job.dtype.size() as u64)?;
            result
        };
        let share = |bytes: u64| {
            if job.elements == 0 { 0 } else { (bytes as u128 * (tile.elements.end - tile.elements.start) as u128 / job.elements as u128) as u64 }
        };
        self.control.advance(share(job.bytes_read()) + share(job.bytes_written()));
        drop(writer);
        self.gather(tile.tensor, result)
    }

    fn copy_tile(&self, job: &Job, tile: &Tile, writer: &Writer, pool: &Pool) -> Result<TileResult> {
        let Some((_, target)) = &job.target else { return Err(Error::mismatch(&job.name, "nothing to copy")) };
        let range = target.bytes(tile.elements.clone());
        let size = job.dtype.size() as u64;
        writer.copy_from(target.map(), range.start, job.offset + tile.elements.start * size, range.end - range.start)?;
        let mut hashes = Vec::new();
        for (_, block) in tile.blocks() {
            if self.plan.digest == Algorithm::None && job.equal.is_empty() {
                hashes.push([0; 32]);
                continue;
            }
            let bytes = target.window(block.clone(), pool)?;
            for other in &job.equal {
                check_equal(job, target, other, &bytes, &other.window(block.clone(), pool)?, block.start)?;
            }
            hashes.push(self.plan.digest.hash(&bytes));
        }
        let inputs = vec![hashes.clone()];
        Ok(TileResult { first_block: (tile.elements.start / BLOCK) as usize, out: hashes, inputs, rounding: Vec::new() })
    }

    fn combine_tile<O: Element, W: Work>(
        &self,
        job: &Job,
        tile: &Tile,
        pool: &Pool,
        out: &mut [u8],
        acc: &mut Vec<W>,
        corrections: &mut Vec<(u32, f64)>,
    ) -> Result<TileResult> {
        let (level, algorithm) = (self.level, self.plan.digest);
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
        let mut result = TileResult {
            first_block: (tile.elements.start / BLOCK) as usize,
            out: Vec::new(),
            inputs: vec![Vec::new(); job.inputs.len()],
            rounding: Vec::new(),
        };
        let (mut wide_target, mut change) = ([W::ZERO; MICRO], [W::ZERO; MICRO]);
        for (block, range) in tile.blocks() {
            gather_corrections(&readers, block, corrections)?;
            let mut pending = corrections.as_slice();
            let mut sums = Rounding::default();
            let mut at = range.start;
            while at < range.end {
                let end = (at + span).min(range.end);
                let acc = &mut acc[..(end - at) as usize];
                accumulate(&mut readers, level, acc, at..end)?;
                for (i, u) in acc.chunks(MICRO).enumerate() {
                    let from = at + (i * MICRO) as u64;
                    let place = (from - tile.elements.start) as usize;
                    let out = &mut out[place * O::SIZE..(place + u.len()) * O::SIZE];
                    let (wide, change) = (&mut wide_target[..u.len()], &mut change[..u.len()]);
                    let here = pending.partition_point(|&(p, _)| range.start + u64::from(p) < from + u.len() as u64);
                    if let Some((t, window)) = &target {
                        // Nearly always: one kernel, one look at every element.
                        if here == 0 && t.dtype() == job.dtype {
                            let bytes = &window[place * O::SIZE..(place + u.len()) * O::SIZE];
                            let finite = dispatch::finish_change::<O, W>(level, out, bytes, u, change);
                            if !finite && !self.plan.allow_nonfinite {
                                dispatch::widen::<O, W>(level, wide, bytes);
                                return Err(blame::<O, W>(job, level, from, out, wide, u, pool));
                            }
                            sums.join(&dispatch::rounding(level, u, change));
                            continue;
                        }
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
                    if !finite && !self.plan.allow_nonfinite {
                        return Err(blame::<O, W>(job, level, from, out, wide, u, pool));
                    }
                    dispatch::change::<O, W>(level, change, out, wide);
                    sums.join(&dispatch::rounding(level, u, change));
                }
                at = end;
            }
            result.rounding.push(sums);
            let place = (range.start - tile.elements.start) as usize..(range.end - tile.elements.start) as usize;
            if algorithm != Algorithm::None {
                result.out.push(algorithm.hash(&out[place.start * O::SIZE..place.end * O::SIZE]));
                let windows = target.iter().map(|(_, w)| &**w).chain(readers.iter().flat_map(Reader::windows));
                for ((bytes, (_, view)), hashes) in windows.zip(&job.inputs).zip(&mut result.inputs) {
                    let size = view.dtype().size();
                    hashes.push(algorithm.hash(&bytes[place.start * size..place.end * size]));
                }
            }
        }
        Ok(result)
    }

    /// Takes in what a tile has to say; the last tile of a tensor writes the journal, the last tensor of a shard finishes the file.
    fn gather(&self, tensor: usize, tile: TileResult) -> Result<()> {
        let job = self.jobs[tensor];
        let blocks = job.elements.div_ceil(BLOCK) as usize;
        let finished = {
            let mut slot = lock(&job.gathered);
            let all = slot.get_or_insert_with(|| Gathered {
                left: self.grid.tiles_of(tensor),
                out: vec![[0; 32]; blocks],
                inputs: vec![vec![[0; 32]; blocks]; job.inputs.len()],
                rounding: vec![Rounding::default(); blocks],
            });
            let put = |into: &mut Vec<BlockHash>, from: &[BlockHash]| {
                if !from.is_empty() {
                    into[tile.first_block..tile.first_block + from.len()].copy_from_slice(from);
                }
            };
            put(&mut all.out, &tile.out);
            for (into, from) in all.inputs.iter_mut().zip(&tile.inputs) {
                put(into, from);
            }
            for (into, from) in all.rounding[tile.first_block.min(blocks)..].iter_mut().zip(&tile.rounding) {
                *into = *from;
            }
            all.left -= 1;
            if all.left == 0 { slot.take() } else { None }
        };
        let Some(all) = finished else { return Ok(()) };
        let digest = |blocks: &[BlockHash]| self.plan.digest.digest(blocks);
        let copy = job.is_copy();
        let rounding = (!copy).then(|| {
            let sum = all.rounding.iter().fold(Rounding::default(), |mut sum, r| {
                sum.join(r);
                sum
            });
            [sum.intended.to_bits(), sum.realised.to_bits(), sum.dot.to_bits(), sum.updated, sum.lost]
        });
        let done = Done {
            name: job.name.clone(),
            file: self.plan.shards[job.shard].file.clone(),
            digest: digest(&all.out),
            inputs: job.inputs.iter().zip(&all.inputs).map(|((r, _), h)| (r.operand, r.name.clone(), digest(h))).collect(),
            rounding,
        };
        lock(&self.journal).add(&done)?;
        lock(&self.done).insert(done.name.clone(), done);
        if self.shards[job.shard].left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.finish_shard(job.shard)?;
        }
        Ok(())
    }

    fn finish_shard(&self, shard: usize) -> Result<()> {
        let writer = lock(&self.shards[shard].writer).take();
        match writer.map(std::sync::Arc::try_unwrap) {
            Some(Ok(writer)) => writer.finish(self.plan.settings.sync),
            // Another worker has just let go of its tile; it cannot write any more, only drop its handle.
            Some(Err(shared)) => finish_shared(shared, self.plan.settings.sync),
            None => Ok(()),
        }
    }
}

fn finish_shared(mut shared: std::sync::Arc<Writer>, sync: bool) -> Result<()> {
    loop {
        match std::sync::Arc::try_unwrap(shared) {
            Ok(writer) => return writer.finish(sync),
            Err(again) => {
                shared = again;
                std::thread::yield_now();
            }
        }
    }
}

fn accumulate<W: Work>(readers: &mut [Reader<'_, W>], level: Level, acc: &mut [W], elements: std::ops::Range<u64>) -> Result<()> {
    if readers.is_empty() {
        acc.fill(W::ZERO);
    }
    for (i, reader) in readers.iter_mut().enumerate() {
        reader.add(level, acc, elements.clone(), i == 0)?;
    }
    Ok(())
}

fn check_equal(job: &Job, a: &TensorView, b: &TensorView, x: &[u8], y: &[u8], from: u64) -> Result<()> {
    if x == y {
        return Ok(());
    }
    let byte = x.iter().zip(y).position(|(x, y)| x != y).unwrap_or(0);
    let index = from + (byte / job.dtype.size()) as u64;
    Err(Error::mismatch(&job.name, format!(
        "integers and booleans pass only if they are equal, and element {index} of this {} differs between {} and {}; leave the tensor out with --exclude to keep the target's",
        job.dtype, a.map().path().display(), b.map().path().display()
    )))
}

const OVERFLOW: &str = "the sum does not fit the output's format; use a smaller alpha or --out-dtype float32";

/// Which input brought the NaN or infinity that some output of these elements has.
fn blame<O: Element, W: Work>(job: &Job, level: Level, from: u64, out: &[u8], t: &[W], u: &[W], pool: &Pool) -> Error {
    let tensors: Vec<&TensorView> = job.target.iter().map(|(_, t)| t).collect();
    match first_nonfinite::<W>(&job.name, &tensors, &job.terms, level, from..from + u.len() as u64, pool) {
        Ok(Some(error)) | Err(error) => error,
        Ok(None) => {
            let i = out.chunks_exact(O::SIZE).position(|o| !O::load(o).finite()).unwrap_or(0);
            let path = job.target.as_ref().map(|(_, t)| t.map().path().to_path_buf()).unwrap_or_default();
            let value = format!("{} after the update", (t[i] + u[i]).to_f64());
            Error::NonFinite { path, tensor: job.name.clone(), index: from + i as u64, value, advice: OVERFLOW }
        }
    }
}
