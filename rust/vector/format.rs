//! `vector_config.json` and the safetensors file beside it; `docs/format.md` is the specification.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize};

use super::stored::Stored;
use crate::dtype::Dtype;
use crate::store::header::Unique;
use crate::store::{Algorithm, Checkpoint};
use crate::{Error, Result};

/// The version that this code writes, and the only one it reads.
pub const VERSION: u32 = 1;
/// The manifest's name.
pub const CONFIG: &str = "vector_config.json";
/// What the data files' names begin with.
pub const STEM: &str = "vector_model";

/// How a tensor of a vector is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Encoding {
    /// Nothing: the donors are equal.
    Zero,
    /// Every element.
    Dense,
    /// A bitmap of the elements that moved, and their values.
    Sparse,
    /// Two thin factors and the weights between them; not exact.
    LowRank,
}

/// One piece of an encoding.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Part {
    /// Its name in the safetensors file.
    pub entry: String,
    /// Its digest.
    pub digest: Option<String>,
}

/// One tensor of a vector.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Row {
    /// The tensor's name in the donors.
    pub name: String,
    /// Its shape.
    pub shape: Vec<u64>,
    /// Its format in the positive donor, which a rebuilt tensor has.
    pub dtype: String,
    /// How it is stored.
    pub encoding: Encoding,
    /// Its elements.
    pub elements: u64,
    /// Those whose difference is not zero.
    pub moved: u64,
    /// The root of the sum of squares; `None` if it is not finite.
    pub norm: Option<f64>,
    /// The largest absolute value.
    pub max: Option<f64>,
    /// Its first position.
    pub max_at: Option<u64>,
    /// Elements that `negative + vector` does not give back bit for bit (always 0 unless the donors are F64).
    pub inexact: u64,
    /// Elements with a correction.
    pub wide: u64,
    /// The rank of a low-rank tensor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rank: Option<u64>,
    /// The norm of what was left out of a tensor that was compressed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub residual: Option<f64>,
    /// Stored bytes.
    pub bytes: u64,
    /// The pieces, by role.
    #[serde(deserialize_with = "unique")]
    pub parts: BTreeMap<String, Part>,
}

/// A role that stands twice would hide the first of its parts.
fn unique<'de, D: Deserializer<'de>>(d: D) -> std::result::Result<BTreeMap<String, Part>, D::Error> {
    Ok(Unique::deserialize(d)?.0.into_iter().collect())
}

#[derive(Debug, Deserialize)]
struct Config {
    format: u32,
    #[serde(default = "no_digest")]
    digest: Algorithm,
    tensors: Vec<Row>,
}

fn no_digest() -> Algorithm {
    Algorithm::None
}

/// An opened vector folder.
#[derive(Debug)]
pub struct VectorFolder {
    path: PathBuf,
    /// How its digests were made.
    pub algorithm: Algorithm,
    /// Its tensors, in the order of the manifest.
    pub rows: Vec<Row>,
    /// The files that hold the parts; `None` when every tensor is zero.
    pub data: Option<Checkpoint>,
    tensors: BTreeMap<String, Arc<Stored>>,
}

impl VectorFolder {
    /// Opens a folder and checks that manifest and data agree.
    ///
    /// # Errors
    /// [`Error::Io`] for missing files, [`Error::Format`] for anything that contradicts the format.
    pub fn open(path: &Path) -> Result<Self> {
        let config_path = path.join(CONFIG);
        let meta = std::fs::metadata(&config_path).map_err(|e| Error::io(&config_path, "open", e))?;
        if meta.len() > 8 * crate::store::header::LONGEST {
            return Err(Error::format(&config_path, format!("a manifest of {} bytes is not credible", meta.len())));
        }
        let bad = |problem: String| Error::format(&config_path, problem);
        if !meta.is_file() {
            return Err(bad("expected a regular file".into()));
        }
        let text = std::fs::read(&config_path).map_err(|e| Error::io(&config_path, "read", e))?;
        let text = String::from_utf8(text).map_err(|e| bad(format!("the manifest is not UTF-8: {e}")))?;
        let config: Config =
            serde_json::from_str(&text).map_err(|e| bad(format!("expected a vector manifest: {e}")))?;
        if config.format != VERSION {
            return Err(bad(format!(
                "is of format {}, this version reads format {VERSION}; use the version of reasonvec that wrote it",
                config.format
            )));
        }
        let data = if config.tensors.iter().any(|r| !r.parts.is_empty()) {
            Some(Checkpoint::open_named(path, STEM)?)
        } else {
            None
        };
        let mut tensors = BTreeMap::new();
        for row in &config.tensors {
            let stored = Stored::open(row, data.as_ref(), path).map_err(|problem| match problem {
                Error::Usage(problem) => bad(format!("tensor {:?}: {problem}", row.name)),
                other => other,
            })?;
            if tensors.insert(row.name.clone(), Arc::new(stored)).is_some() {
                return Err(bad(format!("tensor {:?} stands twice", row.name)));
            }
        }
        Ok(Self { path: path.to_path_buf(), algorithm: config.digest, rows: config.tensors, data, tensors })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// One tensor.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if there is none of that name.
    pub fn tensor(&self, name: &str) -> Result<Arc<Stored>> {
        self.tensors
            .get(name)
            .cloned()
            .ok_or_else(|| Error::mismatch(name, format!("{} has no tensor of this name", self.path.display())))
    }

    /// The format of a row's donors.
    ///
    /// # Errors
    /// [`Error::Format`] if it is unknown.
    pub fn dtype(row: &Row) -> std::result::Result<Dtype, String> {
        Dtype::parse(&row.dtype).ok_or_else(|| format!("has the unknown format {:?}", row.dtype))
    }
}
