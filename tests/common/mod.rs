//! Checkpoints small enough to write in a test, plans over them, and what came out, read by the `safetensors` crate.

#![allow(dead_code, reason = "every test file uses its own part of this")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use reasonvec::Result;
use reasonvec::bf16::{Bf16, Element, F16};
use reasonvec::dtype::{Class, Dtype};
use reasonvec::merge::{self, ApplyPlan, Done};
use reasonvec::philox::splitmix64;
use reasonvec::plan::{Operand, Operands};
use reasonvec::store::Checkpoint;
use reasonvec::store::checkpoint::Shard;
use reasonvec::store::header::{Entry, Header};
use reasonvec::stream::Control;
use reasonvec::vector::VectorFolder;
use reasonvec::vector::extract::{self, ExtractPlan};
use reasonvec::vector::format::Row;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// A tensor with its bytes.
#[derive(Debug, Clone)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<u64>,
    pub(crate) bytes: Vec<u8>,
}

impl Tensor {
    /// A flat tensor of these bit patterns.
    pub(crate) fn bits(name: &str, dtype: Dtype, bits: impl IntoIterator<Item = u64>) -> Self {
        let bytes: Vec<u8> = bits.into_iter().flat_map(|b| b.to_le_bytes().into_iter().take(dtype.size())).collect();
        let shape = vec![(bytes.len() / dtype.size()) as u64];
        Self { name: name.into(), dtype, shape, bytes }
    }

    /// A flat tensor of these numbers, rounded.
    pub(crate) fn floats(name: &str, dtype: Dtype, values: impl IntoIterator<Item = f64>) -> Self {
        Self::bits(name, dtype, values.into_iter().map(|x| narrow(dtype, x)))
    }

    pub(crate) fn shaped(mut self, shape: &[u64]) -> Self {
        assert_eq!(shape.iter().product::<u64>() * self.dtype.size() as u64, self.bytes.len() as u64);
        self.shape = shape.to_vec();
        self
    }

    pub(crate) fn len(&self) -> usize {
        self.bytes.len() / self.dtype.size()
    }

    pub(crate) fn bit(&self, i: usize) -> u64 {
        element(self.dtype, &self.bytes, i)
    }

    pub(crate) fn set(&mut self, i: usize, bits: u64) {
        let size = self.dtype.size();
        self.bytes[i * size..(i + 1) * size].copy_from_slice(&bits.to_le_bytes()[..size]);
    }
}

/// The bits of one element.
pub(crate) fn element(dtype: Dtype, bytes: &[u8], i: usize) -> u64 {
    let mut word = [0; 8];
    word[..dtype.size()].copy_from_slice(&bytes[i * dtype.size()..(i + 1) * dtype.size()]);
    u64::from_le_bytes(word)
}

/// The value of a float's bits.
pub(crate) fn widen(dtype: Dtype, bits: u64) -> f64 {
    match dtype {
        Dtype::F64 => f64::from_bits(bits),
        Dtype::F32 => f64::from(f32::from_bits(bits as u32)),
        Dtype::F16 => F16(bits as u16).widen64(),
        Dtype::BF16 => Bf16(bits as u16).widen64(),
        other => panic!("{other} is no float"),
    }
}

/// The bits of the nearest float.
pub(crate) fn narrow(dtype: Dtype, x: f64) -> u64 {
    match dtype {
        Dtype::F64 => x.to_bits(),
        Dtype::F32 => u64::from((x as f32).to_bits()),
        Dtype::F16 => u64::from(F16::narrow64(x).0),
        Dtype::BF16 => u64::from(Bf16::narrow64(x).0),
        other => panic!("{other} is no float"),
    }
}

/// Numbers that are the same in every run.
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(splitmix64(seed))
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = splitmix64(self.0);
        self.0
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// Like a weight: both signs, a few orders of magnitude around 0.02.
    pub(crate) fn weight(&mut self) -> f64 {
        let unit = (self.next() >> 11) as f64 / (1u64 << 53) as f64 - 0.5;
        unit * 0.1
    }
}

/// A header and data, as one file.
pub(crate) fn write_shard(path: &Path, tensors: &[Tensor]) {
    let listed = tensors.iter().map(|t| (t.name.clone(), t.dtype, t.shape.clone()));
    let mut bytes = Header::build(&[("format".into(), "pt".into())], listed);
    tensors.iter().for_each(|t| bytes.extend(&t.bytes));
    std::fs::write(path, bytes).unwrap();
}

/// A file with this header and so many zero bytes of data.
pub(crate) fn file(text: &[u8], data: usize) -> Vec<u8> {
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text);
    bytes.resize(bytes.len() + data, 0);
    bytes
}

/// A checkpoint of these shards; with an index if there are several.
pub(crate) fn write_checkpoint(folder: &Path, shards: &[Vec<Tensor>]) {
    std::fs::create_dir_all(folder).unwrap();
    if let [one] = shards {
        return write_shard(&folder.join("model.safetensors"), one);
    }
    let mut weight_map = serde_json::Map::new();
    for (i, shard) in shards.iter().enumerate() {
        let name = format!("model-{:05}-of-{:05}.safetensors", i + 1, shards.len());
        write_shard(&folder.join(&name), shard);
        weight_map.extend(shard.iter().map(|t| (t.name.clone(), name.clone().into())));
    }
    let index = serde_json::json!({"metadata": {}, "weight_map": weight_map});
    std::fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

pub(crate) fn checkpoint(folder: &Path) -> Arc<Checkpoint> {
    Arc::new(Checkpoint::open(folder).unwrap())
}

pub(crate) fn vector(folder: &Path) -> Arc<VectorFolder> {
    Arc::new(VectorFolder::open(folder).unwrap())
}

/// Every tensor of a folder's safetensors files, as the `safetensors` crate reads them.
pub(crate) fn contents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut all = BTreeMap::new();
    for file in files(folder).iter().filter(|f| f.extension().is_some_and(|e| e == "safetensors")) {
        let bytes = std::fs::read(file).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        for (name, view) in tensors.tensors() {
            assert!(all.insert(name, view.data().to_vec()).is_none());
        }
    }
    all
}

/// The files of a folder, sorted.
pub(crate) fn files(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|f| f.unwrap().path()).collect();
    files.sort();
    files
}

/// How to run, as plans say it; nobody waits for the disk.
pub(crate) fn how(threads: usize, memory_budget: u64) -> Value {
    json!({"threads": threads, "memory_budget": memory_budget, "sync": false})
}

pub(crate) fn at(operand: usize, name: &str) -> Value {
    json!({"operand": operand, "name": name})
}

/// `c * (operand p - operand n)`.
pub(crate) fn difference(coefficient: f64, p: usize, n: usize, name: &str) -> Value {
    json!({"coefficient": coefficient, "source": {"difference": [at(p, name), at(n, name)]}})
}

/// `c *` a tensor of a vector folder.
pub(crate) fn stored(coefficient: f64, operand: usize, name: &str) -> Value {
    json!({"coefficient": coefficient, "source": {"stored": at(operand, name)}})
}

pub(crate) fn plan<P: DeserializeOwned>(what: Value, how: Value) -> P {
    let (Value::Object(mut what), Value::Object(how)) = (what, how) else { panic!("plans are objects") };
    what.extend(how);
    serde_json::from_value(Value::Object(what)).unwrap()
}

/// `target + terms(name)` for every float tensor of the target, everything else copied, in the target's own shards.
pub(crate) fn apply_plan(
    out: &Path,
    target: &Checkpoint,
    operand: usize,
    how: Value,
    terms: impl Fn(&str) -> Vec<Value>,
) -> ApplyPlan {
    let tensor = |e: &Entry| {
        let terms = if e.dtype.class() == Class::Float { terms(&e.name) } else { Vec::new() };
        json!({"name": e.name, "dtype": e.dtype.name(), "shape": e.shape, "target": at(operand, &e.name), "terms": terms})
    };
    let shard = |s: &Shard| {
        let tensors: Vec<Value> = s.header.entries.iter().map(tensor).collect();
        json!({"file": s.name, "header_of": [operand, s.name], "tensors": tensors})
    };
    std::fs::create_dir_all(out).unwrap();
    plan(json!({"out": out, "shards": target.shards().iter().map(shard).collect::<Vec<_>>()}), how)
}

pub(crate) fn apply(plan: &ApplyPlan, operands: &[Operand]) -> Result<Vec<Done>> {
    merge::apply(plan, Operands(operands), &Control::default())
}

/// The vector of operand 0 minus operand 1: differences of floats, integers that must be equal.
pub(crate) fn extract_plan(out: &Path, positive: &Checkpoint, encoding: &str, how: Value) -> ExtractPlan {
    let tensor = |e: &Entry| {
        let mut tensor = json!({"name": e.name, "dtype": e.dtype.name(), "shape": e.shape});
        if e.dtype.class() == Class::Float {
            tensor["terms"] = json!([difference(1.0, 0, 1, &e.name)]);
        } else {
            tensor["equal"] = json!([at(0, &e.name), at(1, &e.name)]);
        }
        tensor
    };
    let tensors: Vec<Value> = positive.entries().map(|(_, e)| tensor(e)).collect();
    std::fs::create_dir_all(out).unwrap();
    plan(json!({"out": out, "encoding": encoding, "shard_bytes": 1u64 << 40, "tensors": tensors}), how)
}

pub(crate) fn extract(plan: &ExtractPlan, operands: &[Operand]) -> Result<Vec<Row>> {
    extract::extract(plan, Operands(operands), &Control::default()).map(|manifest| manifest.tensors)
}

/// A folder with checkpoints `p`, `n` and `t`, opened as operands 0, 1 and 2.
pub(crate) struct Family {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) operands: Vec<Operand>,
}

impl Family {
    pub(crate) fn new(p: &[Vec<Tensor>], n: &[Vec<Tensor>], t: &[Vec<Tensor>]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut operands = Vec::new();
        for (name, shards) in [("p", p), ("n", n), ("t", t)] {
            write_checkpoint(&folder.path().join(name), shards);
            operands.push(Operand::Checkpoint(checkpoint(&folder.path().join(name))));
        }
        Self { folder, operands }
    }

    /// A family whose members have one shard each.
    pub(crate) fn single(p: &[Tensor], n: &[Tensor], t: &[Tensor]) -> Self {
        Self::new(&[p.to_vec()], &[n.to_vec()], &[t.to_vec()])
    }

    /// A family whose members have one tensor each.
    pub(crate) fn one(p: &Tensor, n: &Tensor, t: &Tensor) -> Self {
        let [p, n, t] = [p, n, t].map(std::slice::from_ref);
        Self::single(p, n, t)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn checkpoint(&self, operand: usize) -> &Checkpoint {
        match &self.operands[operand] {
            Operand::Checkpoint(c) => c,
            Operand::Vector(_) => panic!("operand {operand} is a vector"),
        }
    }

    /// Extracts `p - n` into the folder `v`, opens it as one more operand, and gives its rows.
    pub(crate) fn extract(&mut self, encoding: &str) -> Vec<Row> {
        let plan = extract_plan(&self.path("v"), self.checkpoint(0), encoding, how(2, 64 << 20));
        let rows = extract(&plan, &self.operands).unwrap();
        self.operands.push(Operand::Vector(vector(&self.path("v"))));
        rows
    }

    /// Applies to an operand, into a folder, and gives what is in it then.
    pub(crate) fn apply(
        &self,
        out: &str,
        target: usize,
        terms: impl Fn(&str) -> Vec<Value>,
    ) -> BTreeMap<String, Vec<u8>> {
        let plan = apply_plan(&self.path(out), self.checkpoint(target), target, how(2, 64 << 20), terms);
        apply(&plan, &self.operands).unwrap();
        contents(&self.path(out))
    }
}
