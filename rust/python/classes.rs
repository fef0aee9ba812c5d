//! Handles: an opened checkpoint, an opened vector folder.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::prelude::*;
use serde::de::DeserializeOwned;

use super::enter::fail;
use super::tensor::{Storage, Tensor};
use crate::plan::Operand;
use crate::{Error, store, vector};

/// An opened checkpoint: its headers are read and checked, its tensors are not.
#[pyclass(frozen, module = "reasonvec._reasonvec")]
pub(super) struct Checkpoint {
    inner: Arc<store::Checkpoint>,
    /// One private mapping a shard, made when a tensor of it is first handed over.
    maps: Mutex<Vec<Option<Arc<memmap2::MmapMut>>>>,
}

impl Checkpoint {
    pub(super) fn inner(&self) -> Arc<store::Checkpoint> {
        Arc::clone(&self.inner)
    }
}

#[pymethods]
impl Checkpoint {
    /// Opens a folder of safetensors shards, or one file.
    #[new]
    #[pyo3(signature = (path, stem="model"))]
    fn new(py: Python<'_>, path: PathBuf, stem: &str) -> PyResult<Self> {
        let inner = py.detach(|| store::Checkpoint::open_named(&path, stem)).map_err(|e| fail(py, e))?;
        let maps = Mutex::new(vec![None; inner.shards().len()]);
        Ok(Self { inner: Arc::new(inner), maps })
    }

    /// The path that was opened.
    #[getter]
    fn path(&self) -> &Path {
        self.inner.path()
    }

    /// Every tensor as (name, dtype, shape, shard), in the order of shards and bytes.
    fn tensors(&self) -> Vec<(String, &'static str, Vec<u64>, String)> {
        let row = |(s, e): (&store::checkpoint::Shard, &store::header::Entry)| {
            (e.name.clone(), e.dtype.name(), e.shape.clone(), s.name.clone())
        };
        self.inner.entries().map(row).collect()
    }

    /// Names of the shards.
    fn shards(&self) -> Vec<String> {
        self.inner.shards().iter().map(|s| s.name.clone()).collect()
    }

    /// `__metadata__` of a shard.
    fn metadata(&self, shard: &str) -> Vec<(String, String)> {
        let found = self.inner.shards().iter().find(|s| s.name == shard);
        found.map(|s| s.header.metadata.clone()).unwrap_or_default()
    }

    /// Name of the index file, if there is one.
    #[getter]
    fn index(&self) -> Option<String> {
        self.inner.index().map(str::to_owned)
    }

    /// Oddities that were survived.
    #[getter]
    fn notes(&self) -> Vec<String> {
        self.inner.notes().to_vec()
    }

    /// One tensor, without a copy.
    fn tensor(&self, py: Python<'_>, name: &str) -> PyResult<Tensor> {
        let view = self.inner.tensor(name).map_err(|e| fail(py, e))?;
        let shard = self.inner.shards().iter().position(|s| Arc::ptr_eq(&s.map, view.map())).unwrap_or(0);
        let map = {
            let mut maps = self.maps.lock().unwrap_or_else(PoisonError::into_inner);
            if maps[shard].is_none() {
                maps[shard] = Some(Arc::new(private_map(&self.inner.shards()[shard].map).map_err(|e| fail(py, e))?));
            }
            maps[shard].clone()
        };
        let storage = map.map_or(Storage::Single(Vec::new()), Storage::Mapped);
        Ok(Tensor::new(storage, view.entry.begin as usize, view.dtype(), view.entry.shape))
    }

    fn __len__(&self) -> usize {
        self.inner.len()
    }

    fn __contains__(&self, name: &str) -> bool {
        self.inner.contains(name)
    }
}

/// A private mapping: whoever writes into it changes pages of this process, never the file.
#[allow(unsafe_code)]
fn private_map(file: &store::FileMap) -> crate::Result<memmap2::MmapMut> {
    let io = |e| Error::io(file.path(), "map", e);
    let now = file.file().metadata().map_err(io)?.len();
    if now < file.len() {
        return Err(Error::format(
            file.path(),
            format!("was {} bytes when it was opened and is {now} now", file.len()),
        ));
    }
    // SAFETY: a file that is truncated while torch reads it kills the process, as with any mapped file; the length is checked just above, and every value
    // in the mapping is plain bytes, for which any content is valid.
    unsafe { memmap2::MmapOptions::new().map_copy(file.file()) }.map_err(io)
}

/// An opened vector folder: its manifest and headers are read and checked.
#[pyclass(frozen, module = "reasonvec._reasonvec")]
pub(super) struct VectorFolder(Arc<vector::VectorFolder>);

impl VectorFolder {
    pub(super) fn inner(&self) -> Arc<vector::VectorFolder> {
        Arc::clone(&self.0)
    }
}

#[pymethods]
impl VectorFolder {
    /// Opens a folder.
    #[new]
    fn new(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        let inner = py.detach(|| vector::VectorFolder::open(&path)).map_err(|e| fail(py, e))?;
        Ok(Self(Arc::new(inner)))
    }

    /// The path that was opened.
    #[getter]
    fn path(&self) -> &Path {
        self.0.path()
    }

    /// Every tensor as (name, dtype of the donors, shape).
    fn tensors(&self) -> Vec<(String, String, Vec<u64>)> {
        self.0.rows.iter().map(|r| (r.name.clone(), r.dtype.clone(), r.shape.clone())).collect()
    }

    fn __len__(&self) -> usize {
        self.0.rows.len()
    }
}

/// The operands of a call.
pub(super) fn opened(py: Python<'_>, operands: &[Py<PyAny>]) -> PyResult<Vec<Operand>> {
    operands
        .iter()
        .map(|o| {
            let o = o.bind(py);
            if let Ok(c) = o.cast::<Checkpoint>() {
                Ok(Operand::Checkpoint(c.get().inner()))
            } else {
                Ok(Operand::Vector(o.cast::<VectorFolder>()?.get().inner()))
            }
        })
        .collect()
}

/// JSON of the Python package's own making.
pub(super) fn parse<T: DeserializeOwned>(py: Python<'_>, json: &str) -> PyResult<T> {
    serde_json::from_str(json)
        .map_err(|e| fail(py, Error::Usage(format!("a plan that the core does not understand: {e}"))))
}
