//! One tensor of a vector folder, ready to be read.

use std::ops::Range;
use std::path::{Path, PathBuf};

use super::format::{Encoding, Row, VectorFolder};
use super::lowrank;
use super::sparse::{Sparse, SparseReader};
use super::wide::Wide;
use crate::bf16::Work;
use crate::dtype::{Class, Dtype};
use crate::product::{Product, ProductReader};
use crate::simd::Level;
use crate::simd::dispatch::{self, with_element};
use crate::store::map::{Pool, Window};
use crate::store::{Checkpoint, TensorView};
use crate::{Error, Result};

/// A stored tensor.
#[derive(Debug)]
pub struct Stored {
    /// Its name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<u64>,
    /// The donors' format.
    pub dtype: Dtype,
    /// Its elements.
    pub elements: u64,
    /// The bytes that it takes on disk.
    pub bytes: u64,
    /// The file (or, for a zero tensor, the manifest's folder) that it comes from.
    pub path: PathBuf,
    body: Body,
    wide: Option<Wide>,
}

#[derive(Debug)]
enum Body {
    Zero,
    Dense(TensorView),
    Sparse(Box<Sparse>),
    LowRank(Box<Product>),
}

impl Stored {
    /// Checks a row against the data; problems come as [`Error::Usage`], without the path.
    pub(super) fn open(row: &Row, data: Option<&Checkpoint>, path: &Path) -> Result<Self> {
        let bad = |problem: String| Error::Usage(problem);
        let dtype = VectorFolder::dtype(row).map_err(bad)?;
        let elements = row
            .shape
            .iter()
            .try_fold(1u64, |n, &d| n.checked_mul(d))
            .filter(|n| n.checked_mul(8).is_some())
            .ok_or_else(|| bad(format!("the shape {:?} overflows", row.shape)))?;
        if elements != row.elements {
            return Err(bad(format!(
                "the shape {:?} has {elements} elements, the row says {}",
                row.shape, row.elements
            )));
        }
        let mut bytes = 0;
        for (role, part) in row.parts.iter().filter(|_| data.is_some()) {
            let entry = data.and_then(|d| d.tensor(&part.entry).ok()).map(|t| t.entry);
            let entry =
                entry.ok_or_else(|| bad(format!("the part {role:?} is {:?}, which no data file holds", part.entry)))?;
            bytes += entry.end - entry.begin;
        }
        if data.is_some() && bytes != row.bytes {
            return Err(bad(format!("its parts have {bytes} bytes, the row says {}", row.bytes)));
        }
        let mut wide = None;
        let body = match (row.encoding, data) {
            (Encoding::Zero, _) if row.moved == 0 && row.parts.is_empty() => Body::Zero,
            (Encoding::Zero, _) => return Err(bad("a zero tensor can have no parts".into())),
            _ if dtype.class() != Class::Float => {
                return Err(bad(format!("a tensor of {dtype} can only be zero in a vector")));
            }
            (_, None) => return Err(bad("has parts, but there is no data file".into())),
            (Encoding::Dense, Some(data)) => {
                wide = Wide::open(row, data)?;
                let part =
                    row.parts.get("values").ok_or_else(|| bad("a dense tensor needs the part \"values\"".into()))?;
                let values = data.tensor(&part.entry)?;
                let fits = matches!(values.dtype(), Dtype::BF16 | Dtype::F32 | Dtype::F64);
                if !fits || values.entry.shape != row.shape {
                    return Err(bad(format!(
                        "expected values of BF16, F32 or F64 and shape {:?}, found {} {:?}",
                        row.shape,
                        values.dtype(),
                        values.entry.shape
                    )));
                }
                Body::Dense(values)
            }
            (Encoding::Sparse, Some(data)) => {
                wide = Wide::open(row, data)?;
                Body::Sparse(Box::new(Sparse::open(row, data)?))
            }
            (Encoding::LowRank, Some(data)) => Body::LowRank(Box::new(lowrank::open(row, data)?)),
        };
        Ok(Self {
            name: row.name.clone(),
            shape: row.shape.clone(),
            dtype,
            elements,
            bytes,
            path: path.to_path_buf(),
            body,
            wide,
        })
    }

    /// Whether it is combined in f64: by its donors' format, and where only the negative one was F64, by what is stored.
    pub fn is_double(&self) -> bool {
        let stored = match &self.body {
            Body::Zero => false,
            Body::Dense(v) => v.dtype() == Dtype::F64,
            Body::Sparse(s) => s.is_double(),
            Body::LowRank(p) => p.is_double(),
        };
        stored || self.dtype == Dtype::F64
    }

    /// Whether nothing is stored.
    pub fn is_zero(&self) -> bool {
        matches!(self.body, Body::Zero)
    }

    /// Whether it is best read a whole block at a time.
    pub fn by_block(&self) -> bool {
        matches!(self.body, Body::Sparse(_) | Body::LowRank(_)) || self.wide.is_some()
    }

    /// Bytes that a worker holds while it has a block open, whatever its windows take.
    pub(crate) fn scratch(&self) -> u64 {
        match &self.body {
            Body::LowRank(p) => p.memory(),
            _ => 0,
        }
    }

    pub(crate) fn window_bytes(&self) -> u64 {
        match &self.body {
            Body::Zero => 0,
            Body::Dense(v) => v.dtype().size() as u64,
            Body::Sparse(s) => s.window_bytes(),
            Body::LowRank(_) => 0,
        }
    }

    pub(crate) fn windows_are_read(&self) -> bool {
        match &self.body {
            Body::Zero => false,
            Body::Dense(v) => v.map().windows_are_read(),
            Body::Sparse(s) => s.windows_are_read(),
            Body::LowRank(_) => false,
        }
    }

    pub(crate) fn prefetch(&self, elements: Range<u64>) {
        match &self.body {
            Body::Zero | Body::LowRank(_) => {}
            Body::Dense(v) => v.prefetch(elements),
            Body::Sparse(s) => s.prefetch(elements),
        }
    }

    /// The corrections of a block times a coefficient, by position.
    pub(crate) fn corrections(
        &self,
        block: u64,
        coefficient: f64,
        pool: &Pool,
        into: &mut Vec<(u32, f64)>,
    ) -> Result<()> {
        match &self.wide {
            Some(wide) => wide.read(block, coefficient, pool, into),
            None => Ok(()),
        }
    }

    pub(crate) fn open_on<'a>(&'a self, elements: Range<u64>, pool: &'a Pool) -> Result<StoredReader<'a>> {
        let from = elements.start;
        let body = match &self.body {
            Body::Zero => ReaderBody::Zero,
            Body::Dense(v) => ReaderBody::Dense { window: v.window(elements, pool)?, dtype: v.dtype(), from },
            Body::Sparse(s) => ReaderBody::Sparse(s.open_on(&elements, pool)?),
            Body::LowRank(p) => ReaderBody::LowRank(p.open(elements, pool)?),
        };
        Ok(StoredReader { body, stored: self, pool })
    }
}

/// A stored tensor opened on a tile.
#[derive(Debug)]
pub struct StoredReader<'a> {
    body: ReaderBody<'a>,
    stored: &'a Stored,
    pool: &'a Pool,
}

#[derive(Debug)]
enum ReaderBody<'a> {
    Zero,
    Dense { window: Window<'a>, dtype: Dtype, from: u64 },
    Sparse(SparseReader<'a>),
    LowRank(ProductReader),
}

impl StoredReader<'_> {
    pub(crate) fn add<W: Work>(
        &self,
        level: Level,
        acc: &mut [W],
        elements: Range<u64>,
        c: W,
        first: bool,
    ) -> Result<()> {
        match &self.body {
            ReaderBody::Zero if first => acc.fill(W::ZERO),
            ReaderBody::Zero => {}
            ReaderBody::Dense { window, dtype, from } => {
                let size = dtype.size() as u64;
                let bytes = &window[((elements.start - from) * size) as usize..((elements.end - from) * size) as usize];
                with_element!(*dtype, E => dispatch::scaled::<E, W>(level, acc, bytes, c, first));
            }
            ReaderBody::Sparse(reader) => reader.add(acc, elements, c, first)?,
            ReaderBody::LowRank(reader) => reader.add(level, acc, elements, c, first),
        }
        Ok(())
    }

    pub(crate) fn corrections(&self, block: u64, coefficient: f64, into: &mut Vec<(u32, f64)>) -> Result<()> {
        self.stored.corrections(block, coefficient, self.pool, into)
    }
}
