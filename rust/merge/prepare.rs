//! What is to be written: the plan, checked against its operands and laid out to the byte before anything is written.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::dtype::{Class, Dtype};
use crate::operand::Term;
use crate::plan::{Operands, Ref, Settings, TermPlan, dtype, elements};
use crate::simd::dispatch::MICRO;
use crate::store::header::Header;
use crate::store::{Algorithm, TensorView};
use crate::stream::{BLOCK, Budget};
use crate::{Error, Result};

use super::method::{Method, MethodPlan};
use super::points::Lanes;

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
    /// How its terms are merged; they are added if nothing is said. With a method they are models, and their coefficients are weights.
    #[serde(default)]
    pub method: Option<MethodPlan>,
    /// The format to which inputs and every step of the method are rounded, if any: only of methods that weigh what stays of task vectors.
    #[serde(default)]
    pub steps: Option<String>,
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

/// A tensor, with everything that it is made of opened and checked.
pub(super) struct Job {
    pub(super) name: String,
    pub(super) shard: usize,
    pub(super) offset: u64,
    pub(super) dtype: Dtype,
    pub(super) elements: u64,
    pub(super) target: Option<(Ref, TensorView)>,
    pub(super) terms: Vec<Term>,
    pub(super) inputs: Vec<(Ref, TensorView)>,
    pub(super) equal: Vec<TensorView>,
    pub(super) double: bool,
    pub(super) by_block: bool,
    pub(super) method: Option<Method>,
    pub(super) steps: Option<Dtype>,
}

impl Job {
    /// Stages of it: the combining one, and before it those that measure.
    pub(super) fn stages(&self) -> usize {
        1 + self.method.as_ref().map_or(0, Method::measures)
    }

    /// How often its inputs are read, as far as one can know beforehand.
    pub(super) fn readings(&self) -> u64 {
        1 + self.method.as_ref().map_or(0, Method::readings)
    }

    /// Bytes that its workers hold together, however many they are.
    fn shared_memory(&self) -> u64 {
        self.method.as_ref().map_or(0, Method::shared_memory)
    }

    pub(super) fn is_copy(&self) -> bool {
        self.method.is_none()
            && self.terms.is_empty()
            && self.target.as_ref().is_some_and(|(_, t)| t.dtype() == self.dtype)
    }

    pub(super) fn bytes_read(&self) -> u64 {
        let size = |t: &TensorView| t.entry.end - t.entry.begin;
        self.inputs.iter().map(|(_, t)| size(t)).sum::<u64>()
            + self.equal.iter().map(size).sum::<u64>()
            + self.terms.iter().flat_map(Term::sources).map(|s| s.stored_bytes()).sum::<u64>()
    }

    pub(super) fn bytes_written(&self) -> u64 {
        self.elements * self.dtype.size() as u64
    }

    /// Bytes that a worker holds, and those that it holds for every block of a tile.
    pub(super) fn memory(&self) -> (u64, u64) {
        let read = |t: &TensorView| if t.map().windows_are_read() { t.dtype().size() as u64 } else { 0 };
        let target = self.target.as_ref().map_or(0, |(_, t)| read(t));
        let equal = self.equal.iter().map(read).sum::<u64>();
        if self.is_copy() {
            return ((target + equal) * BLOCK, 0);
        }
        let work = if self.double { 8 } else { 4 };
        let span = if self.by_block { BLOCK } else { MICRO as u64 };
        let mut fixed = span * work + (target + equal) * BLOCK;
        for term in &self.terms {
            let (bytes, scratch) = term.memory();
            fixed += bytes * BLOCK + scratch;
        }
        if let Some(method) = &self.method {
            let inputs = self.terms.len();
            fixed +=
                method.memory() + if self.double { Lanes::<f64>::memory(inputs) } else { Lanes::<f32>::memory(inputs) };
        }
        // The output twice: one tile may wait to be written while its worker makes the next.
        (fixed, 2 * self.dtype.size() as u64 * BLOCK)
    }
}

/// Every tensor, every header, and the length of every file.
pub(super) struct Prepared {
    pub(super) jobs: Vec<Job>,
    pub(super) headers: Vec<Vec<u8>>,
    pub(super) lengths: Vec<u64>,
}

/// Opens, checks and lays out.
pub(super) fn prepare(plan: &ApplyPlan, operands: Operands<'_>) -> Result<Prepared> {
    let mut jobs = Vec::new();
    let (mut headers, mut lengths) = (Vec::new(), Vec::new());
    // The journal, and what is done, go by names.
    crate::plan::distinct(plan.shards.iter().map(|s| s.file.as_str()))?;
    crate::plan::distinct(plan.shards.iter().flat_map(|s| &s.tensors).map(|t| t.name.as_str()))?;
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
    let source = source.ok_or_else(|| {
        Error::Usage(format!("the plan keeps the header of {file:?}, which operand {operand} does not have"))
    })?;
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
            return Err(Error::mismatch(
                &plan.name,
                format!("the target's shape is {:?}, the plan says {:?}", t.entry.shape, plan.shape),
            ));
        }
        if t.dtype() != out && !(t.dtype().is_float() && out.is_float()) {
            return Err(Error::mismatch(&plan.name, format!("cannot turn {} into {out}", t.dtype())));
        }
        if t.dtype().class() == Class::Refused && !plan.terms.is_empty() {
            return Err(Error::mismatch(
                &plan.name,
                format!("is {} in {}; dequantise the checkpoint first", t.dtype(), t.map().path().display()),
            ));
        }
    } else if !out.is_float() {
        return Err(Error::mismatch(&plan.name, format!("a tensor of {out} needs a target to be copied from")));
    }
    if !plan.terms.is_empty() && !out.is_float() {
        return Err(Error::mismatch(
            &plan.name,
            format!("nothing can be added to {out}; integers and booleans are copied"),
        ));
    }
    let mut inputs: Vec<(Ref, TensorView)> = target.iter().cloned().collect();
    let mut terms = Vec::with_capacity(plan.terms.len());
    let mut double = out == Dtype::F64 || target.as_ref().is_some_and(|(_, t)| t.dtype() == Dtype::F64);
    let by_method = plan.method.as_ref().is_some_and(|m| *m != (MethodPlan::Linear {}));
    for t in &plan.terms {
        let term = operands.term(t, &plan.name, elements)?;
        // Also of what turns out to add nothing: a zero vector is combined as any other of its format.
        double |= term.is_double();
        if term.is_zero() && !by_method {
            continue;
        }
        if let (Some(crate::plan::SourcePlan::Difference([p, n])), None) = (&t.source, &t.control) {
            inputs.push((p.clone(), operands.tensor(p)?));
            inputs.push((n.clone(), operands.tensor(n)?));
        } else if let (
            Some(crate::plan::SourcePlan::Tensor(r) | crate::plan::SourcePlan::Adapted { tensor: r, .. }),
            None,
        ) = (&t.source, &t.control)
        {
            inputs.push((r.clone(), operands.tensor(r)?));
        }
        terms.push(term);
    }
    let mut equal = Vec::new();
    for r in &plan.equal {
        let t = operands.tensor(r)?;
        let same = target
            .as_ref()
            .is_some_and(|(_, target)| target.dtype() == t.dtype() && target.entry.shape == t.entry.shape);
        if !same {
            return Err(Error::mismatch(
                &plan.name,
                format!(
                    "{} {:?} in {} must equal the target's, but has another format or shape",
                    t.dtype(),
                    t.entry.shape,
                    t.map().path().display()
                ),
            ));
        }
        equal.push(t);
    }
    let method = Method::prepare(plan, &terms, elements, double)?;
    let steps = plan.steps.as_ref().map(|name| dtype(name, &plan.name)).transpose()?;
    if steps.is_some_and(|d| !d.is_float())
        || (steps.is_some() && !plan.method.as_ref().is_some_and(MethodPlan::weighs))
    {
        let problem =
            format!("the steps of this method cannot be rounded to {}", plan.steps.as_deref().unwrap_or_default());
        return Err(Error::mismatch(&plan.name, problem));
    }
    let by_block = method.is_none() && terms.iter().any(Term::by_block);
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
        method,
        steps,
    })
}

/// Shards that are under way at a time: systems let one write into a file at a time, and two workers in one shard wait for each other.
///
/// Fewer where a tensor keeps something from stage to stage, and one where that is as large as the tensor, or where nobody waits.
pub(super) fn lanes(jobs: &[Job], threads: usize) -> usize {
    let methods = || jobs.iter().filter_map(|j| j.method.as_ref());
    match methods().next() {
        _ if threads == 1 => 1,
        None => 4,
        Some(_) if methods().any(|m| matches!(m, Method::Spectral(_))) => 1,
        Some(_) => 2,
    }
}

/// Blocks that are written at once: of a file in memory, a write of 2 MiB takes a third less time than four.
///
/// They are read one after the other: the windows of one block of three bf16 tensors still fit the second-level cache, or nearly.
const LONGEST_TILE: u64 = 4;

/// Who may hold how much.
pub(super) fn share_budget(jobs: &[Job], settings: &Settings) -> Budget {
    let fixed = jobs.iter().map(|j| j.memory().0).max().unwrap_or(0) + (MICRO * 16) as u64;
    let per_block = jobs.iter().map(|j| j.memory().1).max().unwrap_or(0);
    // In every lane as many tensors are under way as one has stages.
    let stages = jobs.iter().map(Job::stages).max().unwrap_or(1);
    let mut shared: Vec<u64> = jobs.iter().map(Job::shared_memory).collect();
    shared.sort_unstable_by(|a, b| b.cmp(a));
    let shared: u64 = shared.iter().take(stages * lanes(jobs, settings.threads())).sum();
    let limit = settings.memory_budget.saturating_sub(shared);
    let budget = Budget::share(limit, settings.threads(), fixed, per_block.max(1), LONGEST_TILE);
    Budget { bytes: budget.bytes + shared, ..budget }
}

/// What a plan will read, write and hold, from headers alone; every check that [`apply`] makes before it writes.
///
/// # Errors
/// As [`apply`].
pub fn predict(plan: &ApplyPlan, operands: Operands<'_>) -> Result<Prediction> {
    let prepared = prepare(plan, operands)?;
    let budget = share_budget(&prepared.jobs, &plan.settings);
    Ok(Prediction {
        read: prepared.jobs.iter().map(|j| j.bytes_read() * j.readings()).sum(),
        written: prepared.lengths.iter().sum(),
        memory: budget.bytes,
        threads: budget.threads,
    })
}
