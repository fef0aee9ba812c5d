//! Writing a whole output: shards laid out in advance, tiles in any order, a journal of what is done, final names for what is whole.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Mutex, OnceLock, PoisonError};

use serde::{Deserialize, Serialize};

use crate::bf16::Work;
use crate::plan::{Operands, noises, scale_noise};
use crate::simd::Level;
use crate::simd::dispatch::{Rounding, with_element};
use crate::store::Algorithm;
use crate::store::TensorView;
use crate::store::buffer::Buffer;
use crate::store::digest::BlockHash;
use crate::store::journal::Journal;
use crate::store::map::{FileMap, Pool};
use crate::store::writer::{self, Writer};
use crate::stream::{BLOCK, Control, Gates, Grid, Tile, Visit, pass, visits};
use crate::{Error, Result};

use super::linear::{How, Sum, TileResult, combine_tile, copy_tile};
use super::mask::{self, Mask};
use super::method::{Method, Worker};
use super::points::Update;
use super::prepare::{ApplyPlan, Job, Prepared, lanes, prepare, share_budget};

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
    desk: Mutex<Desk>,
}

/// Where tiles of a file wait while another is being written: systems let one write into a file at a time, and who waits for that spins.
#[derive(Default)]
struct Desk {
    busy: bool,
    waiting: VecDeque<Ready>,
}

/// A tile that is to be written.
struct Ready {
    bytes: Buffer,
    writer: std::sync::Arc<Writer>,
    offset: u64,
    /// Which of the visits it is of.
    visit: usize,
    result: TileResult,
}

/// How well outputs were foreseen so far, in blocks.
#[derive(Default)]
struct Record {
    foreseen: AtomicU64,
    mistaken: AtomicU64,
}

impl Record {
    /// Whether it is worth while: a block that was mistaken costs a writing more, and one that was not saves a reading.
    fn is_good(&self) -> bool {
        const CREDIT: u64 = 256;
        self.mistaken.load(Ordering::Relaxed) <= self.foreseen.load(Ordering::Relaxed) / 2 + CREDIT
    }
}

/// Writes the shards of a plan. The journal stays: the caller removes it when everything else in the folder is whole.
///
/// # Errors
/// [`Error::Mismatch`] before anything is written, if operands do not fit; then [`Error::Io`], [`Error::NonFinite`], [`Error::Cancelled`], and
/// [`Error::Damage`] for a stored vector whose bytes have changed. No shard that is not whole bears its final name.
pub fn apply(plan: &ApplyPlan, operands: Operands<'_>, control: &Control) -> Result<Vec<Done>> {
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
        shards.push(ShardRun { writer: Mutex::new(writer), left: AtomicUsize::new(left), desk: Mutex::default() });
    }

    // Syncing a shard waits for the disk; the workers go on with the next one.
    let (whole, to_finish) = std::sync::mpsc::channel();
    let lanes = lanes(&jobs, plan.settings.threads());
    let visits = visits(&todo.iter().map(|j| (j.stages(), j.shard % lanes)).collect::<Vec<_>>());
    let lengths = visits.iter().map(|v| todo[v.tensor].elements).collect();
    let lane = |visit: usize| todo[visits[visit].tensor].shard % lanes;
    let grid = Grid::in_lanes(lengths, budget.blocks_per_tile, lane);
    let run = Run {
        plan,
        gates: Gates::new(todo.len()),
        left: (0..visits.len()).map(|v| AtomicUsize::new(grid.tiles_of(v))).collect(),
        visits,
        how: How { level: Level::current()?, digest: plan.digest, allow_nonfinite: plan.allow_nonfinite },
        control,
        threads: budget.threads,
        spare: Mutex::new((1..budget.threads).map(|_| Buffer::default()).collect()),
        gathered: todo.iter().map(|_| Mutex::new(None)).collect(),
        foresees: todo.iter().map(|_| OnceLock::new()).collect(),
        record: Record::default(),
        jobs: &todo,
        whole,
        grid,
        shards: &shards,
        journal: Mutex::new(journal),
        done: Mutex::new(done),
    };
    control.expect(todo.iter().map(|j| j.bytes_read() * j.readings() + j.bytes_written()).sum());
    for (shard, state) in shards.iter().enumerate() {
        // Shards whose tensors were all done when the last run stopped, or that have none.
        if state.left.load(Ordering::Relaxed) == 0 {
            hand_over(&run.whole, shard);
        }
    }
    let done = std::thread::scope(|scope| {
        let shards = &shards;
        let finisher = scope.spawn(move || {
            let finished =
                to_finish.iter().take(shards.len()).try_for_each(|shard| shards[shard].finish(plan.settings.sync));
            if finished.is_err() {
                control.cancel();
            }
            finished
        });
        let passed = pass::run(
            &run.grid,
            budget.threads,
            control,
            Scratch::default,
            |tile| run.prefetch(tile),
            |scratch, _, tile| {
                let visit = run.visits[tile.tensor];
                let result = run.visit(scratch, visit, tile);
                if result.is_err() {
                    run.gates.give_up();
                    run.jobs[visit.tensor].method.iter().for_each(Method::give_up);
                }
                result
            },
        );
        let Run { done, whole, .. } = run;
        // Ends the finisher when shards are missing.
        drop(whole);
        let finished = finisher.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        match (finished, passed) {
            (Err(e), _) | (Ok(()), Err(e)) => Err(e),
            (Ok(()), Ok(())) => Ok(done),
        }
    })?;

    let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    jobs.iter()
        .map(|j| done.remove(&j.name).ok_or_else(|| Error::mismatch(&j.name, "was not written; please report this")))
        .collect()
}

/// What must be equal for a run to be continued: the plan less its settings, the identity of every input file, and what vectors say of their tensors.
fn fingerprint(plan: &ApplyPlan, operands: Operands<'_>) -> Result<String> {
    let (mut files, mut manifests) = (Vec::new(), Vec::new());
    for operand in operands.0 {
        let checkpoint = match operand {
            crate::plan::Operand::Checkpoint(c) => Some(c.as_ref()),
            crate::plan::Operand::Vector(v) => {
                manifests.push(&v.rows);
                v.data.as_ref()
            }
        };
        for shard in checkpoint.map_or(&[][..], |c| c.shards()) {
            let path = shard.map.path();
            let meta = std::fs::metadata(path).map_err(|e| Error::io(path, "inspect", e))?;
            let modified = meta.modified().ok().and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok());
            files.push((path.to_path_buf(), meta.len(), modified.map(|d| d.as_nanos().to_string())));
        }
    }
    let text = serde_json::to_vec(&(&plan.digest, plan.allow_nonfinite, &plan.shards, files, manifests))
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
        if let Some(map) = map
            && job.offset + job.bytes_written() <= map.len()
            && line.digest.is_some()
        {
            views.push((TensorView::at(map, &job.name, job.dtype, job.offset, job.elements), line));
        }
    }
    let tensors: Vec<&TensorView> = views.iter().map(|(v, _)| v).collect();
    let digests = crate::inspect::digests(&tensors, plan.digest, &plan.settings, control)?;
    Ok(views
        .into_iter()
        .zip(digests)
        .filter(|((_, l), d)| l.digest == *d)
        .map(|((_, l), _)| (l.name.clone(), l))
        .collect())
}

#[derive(Default)]
struct Scratch {
    pool: Pool,
    out: Buffer,
    corrections: Vec<(u32, f64)>,
    single: Buffers<f32>,
    double: Buffers<f64>,
}

/// The buffers of one work type.
#[derive(Default)]
struct Buffers<W> {
    update: Vec<W>,
    method: mask::Scratch<W>,
}

struct Run<'a> {
    plan: &'a ApplyPlan,
    how: How,
    control: &'a Control,
    threads: usize,
    /// Buffers for workers whose tiles wait to be written.
    spare: Mutex<Vec<Buffer>>,
    jobs: &'a [&'a Job],
    gathered: Vec<Mutex<Option<Gathered>>>,
    /// Whether the output of a tensor is made while it is measured.
    foresees: Vec<OnceLock<bool>>,
    record: Record,
    whole: Sender<usize>,
    grid: Grid,
    /// What the tiles of the grid belong to.
    visits: Vec<Visit>,
    /// Tiles of each visit that are not done.
    left: Vec<AtomicUsize>,
    gates: Gates,
    shards: &'a [ShardRun],
    journal: Mutex<Journal>,
    done: Mutex<HashMap<String, Done>>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Run<'_> {
    fn prefetch(&self, tile: &Tile) {
        let Visit { tensor, stage } = self.visits[tile.tensor];
        // What comes after the first stage was read a moment ago.
        if stage > 0 {
            return;
        }
        let job = self.jobs[tensor];
        if let Some((_, target)) = &job.target {
            target.prefetch(tile.elements.clone());
        }
        for term in &job.terms {
            term.prefetch(tile.elements.clone());
        }
    }

    fn visit(&self, scratch: &mut Scratch, visit: Visit, tile: &Tile) -> Result<()> {
        self.gates.wait(visit, self.control)?;
        let job = self.jobs[visit.tensor];
        let Some(method) = job.method.as_ref().filter(|m| visit.stage < m.measures()) else {
            return self.combine(scratch, tile);
        };
        let mut unseen = tile.elements.start;
        if let Some(mask) = method.foresight(visit.stage)
            && *self.foresees[visit.tensor].get_or_init(|| self.record.is_good())
        {
            unseen = self.foresee(scratch, mask, tile)?;
            if unseen == tile.elements.end {
                return Ok(());
            }
        }
        if !method.skips(visit.stage) {
            let Scratch { pool, single, double, .. } = scratch;
            let worker = self.worker(pool);
            for block in tile.split().filter(|block| block.elements.start >= unseen) {
                if job.double {
                    measure(method, visit.stage, worker, job, &block, double)?;
                } else {
                    measure(method, visit.stage, worker, job, &block, single)?;
                }
            }
        }
        self.measured(tile.tensor)?;
        if visit.stage as u64 + 1 < job.readings() {
            self.control.advance(share(job, tile, job.bytes_read()));
        }
        Ok(())
    }

    /// Says that a tile of a measuring stage is done; the last one ends the stage.
    fn measured(&self, number: usize) -> Result<()> {
        if self.left[number].fetch_sub(1, Ordering::AcqRel) != 1 {
            return Ok(());
        }
        let visit = self.visits[number];
        let Some(method) = &self.jobs[visit.tensor].method else { return Ok(()) };
        if !method.skips(visit.stage) {
            method.solve(visit.stage, self.control)?;
        }
        if self.foresees[visit.tensor].get() == Some(&true)
            && let Some(mistaken) = method.look_back()
        {
            self.record.mistaken.fetch_add(mistaken, Ordering::Relaxed);
            self.record.foreseen.fetch_add(self.jobs[visit.tensor].elements.div_ceil(BLOCK), Ordering::Relaxed);
        }
        self.gates.open(visit);
        Ok(())
    }

    /// Measures a tile, and makes the output that is to be expected. Where that cannot be, nothing is written: the first element that was not
    /// measured.
    fn foresee(&self, scratch: &mut Scratch, mask: &Mask, tile: &Tile) -> Result<u64> {
        let job = self.jobs[self.visits[tile.tensor].tensor];
        match self.make(scratch, job, Some(mask), tile) {
            Ok(result) => {
                self.hand_in(scratch, job, tile, result)?;
                self.control.advance(share(job, tile, job.bytes_read()));
                Ok(tile.elements.end)
            }
            Err(Unmade { from, error: Error::NonFinite { .. } }) => {
                // Perhaps only because something else was expected.
                mask.forget(&mut scratch.single.method);
                mask.forget(&mut scratch.double.method);
                Ok(from)
            }
            Err(Unmade { error, .. }) => Err(error),
        }
    }

    fn worker<'w>(&'w self, pool: &'w Pool) -> Worker<'w> {
        let How { level, allow_nonfinite, .. } = self.how;
        // Two tensors are under way at a time.
        let threads = self.threads.div_ceil(2);
        Worker { level, control: self.control, pool, allow_nonfinite, threads }
    }

    fn combine(&self, scratch: &mut Scratch, tile: &Tile) -> Result<()> {
        let job = self.jobs[self.visits[tile.tensor].tensor];
        if job.is_copy() {
            let result = copy_tile(&self.how, job, tile, &*self.writer(job)?, &scratch.pool)?;
            self.gather(tile.tensor, result)?;
        } else if let Some(tile) = left_to_make(job, tile) {
            let result = self.make(scratch, job, None, &tile).map_err(|unmade| unmade.error)?;
            self.hand_in(scratch, job, &tile, result)?;
        } else {
            self.gather(tile.tensor, TileResult::default())?;
        }
        self.control.advance(share(job, tile, job.bytes_read()) + share(job, tile, job.bytes_written()));
        Ok(())
    }

    fn writer(&self, job: &Job) -> Result<std::sync::Arc<Writer>> {
        let writer = lock(&self.shards[job.shard].writer).clone();
        writer.ok_or_else(|| Error::mismatch(&job.name, "its shard was closed too early; please report this"))
    }

    /// Makes a tile of the output, block by block; the one that is to be expected, if that is foreseen.
    fn make(
        &self,
        scratch: &mut Scratch,
        job: &Job,
        foreseen: Option<&Mask>,
        tile: &Tile,
    ) -> std::result::Result<TileResult, Unmade> {
        let Scratch { pool, out, single, double, corrections } = scratch;
        let size = job.dtype.size();
        let length = (tile.elements.end - tile.elements.start) as usize * size;
        let mut out = out.fit(length, job.offset + tile.elements.start * size as u64);
        let worker = self.worker(pool);
        let mut whole = TileResult::of(job, tile);
        for tile in tile.split() {
            let elements = (tile.elements.end - tile.elements.start) as usize;
            let (here, rest) = out.split_at_mut(elements * size);
            out = rest;
            let made = with_element!(job.dtype, O => if job.double {
                with_update(job, worker, &mut double.method, foreseen, &mut |update| combine_tile::<O, f64>(&self.how, job, &tile, pool, here, &mut double.update, corrections, update))
            } else {
                with_update(job, worker, &mut single.method, foreseen, &mut |update| combine_tile::<O, f32>(&self.how, job, &tile, pool, here, &mut single.update, corrections, update))
            });
            whole.join(made.map_err(|error| Unmade { from: tile.elements.start, error })?);
        }
        Ok(whole)
    }

    /// Writes a tile that was made, and those that come to wait meanwhile; or leaves it to whoever is writing.
    fn hand_in(&self, scratch: &mut Scratch, job: &Job, tile: &Tile, result: TileResult) -> Result<()> {
        let writer = self.writer(job)?;
        let offset = job.offset + tile.elements.start * job.dtype.size() as u64;
        let bytes = std::mem::take(&mut scratch.out);
        let ready = Ready { bytes, writer, offset, visit: tile.tensor, result };
        let shard = &self.shards[job.shard];
        let busy = {
            let mut desk = lock(&shard.desk);
            if desk.busy
                && let Some(buffer) = lock(&self.spare).pop()
            {
                desk.waiting.push_back(ready);
                scratch.out = buffer;
                return Ok(());
            }
            std::mem::replace(&mut desk.busy, true)
        };
        scratch.out = self.write(ready)?;
        if busy {
            return Ok(());
        }
        loop {
            let mut desk = lock(&shard.desk);
            let Some(next) = desk.waiting.pop_front() else {
                desk.busy = false;
                return Ok(());
            };
            drop(desk);
            let free = self.write(next)?;
            lock(&self.spare).push(free);
        }
    }

    /// Writes a tile and takes in what it says; its buffer.
    fn write(&self, ready: Ready) -> Result<Buffer> {
        let Ready { bytes, writer, offset, visit, result } = ready;
        writer.write_at(&bytes, offset)?;
        drop(writer);
        self.gather(visit, result)?;
        Ok(bytes)
    }

    /// Takes in what a tile has to say; the last tile of a tensor writes the journal, the last tensor of a shard finishes the file.
    ///
    /// What was foreseen is kept until the tensor's last stage, which makes some of it anew.
    fn gather(&self, number: usize, tile: TileResult) -> Result<()> {
        let Visit { tensor, stage } = self.visits[number];
        let (job, tiles) = (self.jobs[tensor], self.grid.tiles_of(number));
        let foreseen = stage + 1 < job.stages();
        let blocks = job.elements.div_ceil(BLOCK) as usize;
        let finished = {
            let mut slot = lock(&self.gathered[tensor]);
            let all = slot.get_or_insert_with(|| Gathered {
                left: tiles,
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
            if foreseen {
                drop(slot);
                return self.measured(number);
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
            inputs: job
                .inputs
                .iter()
                .zip(&all.inputs)
                .map(|((r, _), h)| (r.operand, r.name.clone(), digest(h)))
                .collect(),
            rounding,
        };
        lock(&self.journal).add(&done)?;
        lock(&self.done).insert(done.name.clone(), done);
        if self.shards[job.shard].left.fetch_sub(1, Ordering::AcqRel) == 1 {
            hand_over(&self.whole, job.shard);
        }
        Ok(())
    }
}

/// A tile that could not be made, from its first block that could not on.
struct Unmade {
    from: u64,
    error: Error,
}

/// The blocks of a tile that were not foreseen as they are.
fn left_to_make(job: &Job, tile: &Tile) -> Option<Tile> {
    let stands = |block: u64| job.method.as_ref().is_some_and(|method| method.stands(block));
    let mut left = tile.blocks().filter(|&(block, _)| !stands(block)).map(|(_, elements)| elements);
    match left.next() {
        Some(first) => {
            let end = left.last().map_or(first.end, |last| last.end);
            Some(Tile { tensor: tile.tensor, elements: first.start..end })
        }
        None => (tile.elements.is_empty() && job.method.is_none()).then(|| tile.clone()),
    }
}

/// A tile's part of some bytes of its tensor.
fn share(job: &Job, tile: &Tile, bytes: u64) -> u64 {
    if job.elements == 0 {
        return 0;
    }
    (u128::from(bytes) * u128::from(tile.elements.end - tile.elements.start) / u128::from(job.elements)) as u64
}

fn measure<W: Work>(
    method: &Method,
    stage: usize,
    worker: Worker<'_>,
    job: &Job,
    tile: &Tile,
    buffers: &mut Buffers<W>,
) -> Result<()> {
    match method {
        Method::Gram(gram) => gram.measure(worker, job, tile, &mut buffers.method.lanes),
        Method::Mask(mask) => mask.measure(stage, worker, job, tile, &mut buffers.method),
        Method::Spectral(spectral) => spectral.measure::<W>(worker, job, tile),
    }
}

/// Calls `with` with what makes the tiles of a tensor.
fn with_update<W: Work, R>(
    job: &Job,
    worker: Worker<'_>,
    scratch: &mut mask::Scratch<W>,
    foreseen: Option<&Mask>,
    with: &mut dyn FnMut(&mut dyn Update<W>) -> Result<R>,
) -> Result<R> {
    if let Some(mask) = foreseen {
        return with(&mut mask.foresee(worker, job, scratch)?);
    }
    match &job.method {
        None => with(&mut Sum),
        Some(Method::Gram(gram)) => with(&mut gram.update(&mut scratch.lanes)),
        Some(Method::Mask(mask)) => with(&mut mask.update(worker, job, scratch)),
        Some(Method::Spectral(spectral)) => with(&mut spectral.update(worker, job)),
    }
}

/// Tells the finisher that every tensor of a shard is written.
fn hand_over(whole: &Sender<usize>, shard: usize) {
    // The finisher is gone only after an error of its own, which the run ends with.
    let _ = whole.send(shard);
}

impl ShardRun {
    /// Syncs the file and gives it its final name. A worker may still hold the writer for an instant after its last tile; it writes no more.
    fn finish(&self, sync: bool) -> Result<()> {
        let Some(mut shared) = lock(&self.writer).take() else { return Ok(()) };
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
}
