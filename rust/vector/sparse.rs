//! The sparse encoding: one bit per element, and the values of those that moved.
//!
//! A value is a code into a palette of up to 255 values, a bf16, or a whole number of the work type. RL moves a weight by one or a few
//! units in its last place, so that a tensor's millions of values are a few hundred different ones, and a byte names them. What does not fit is an
//! escape: the next entry of a side list.

use std::ops::Range;

use super::format::Row;
use super::wide::words;
use crate::bf16::{Bf16, Element, Work};
use crate::dtype::Dtype;
use crate::store::map::{Pool, Window};
use crate::store::{Checkpoint, TensorView};
use crate::stream::BLOCK;
use crate::{Error, Result};

/// The palette code that means "the next escape".
pub const ESCAPE_CODE: u8 = 255;
/// The bf16 bits that mean "the next escape".
pub const ESCAPE_BF16: u16 = 0x7FC0;

/// A sparse tensor on disk.
#[derive(Debug)]
pub struct Sparse {
    elements: u64,
    bitmap: TensorView,
    values: TensorView,
    palette: Vec<f32>,
    escapes: Option<TensorView>,
    /// Set bits and escapes before each block, and the totals.
    starts: Vec<[u64; 2]>,
}

impl Sparse {
    pub(super) fn open(row: &Row, data: &Checkpoint) -> Result<Self> {
        let bad = |problem: String| Error::Usage(problem);
        let part = |role: &str| row.parts.get(role).map(|p| data.tensor(&p.entry)).transpose();
        let need = |role: &str| part(role)?.ok_or_else(|| bad(format!("a sparse tensor needs the part {role:?}")));
        let (bitmap, values, starts) = (need("bitmap")?, need("values")?, need("starts")?);
        let escapes = part("escapes")?;
        let n = row.elements;
        let bytes = n.div_ceil(64) * 8;
        if bitmap.dtype() != Dtype::U8 || bitmap.elements() != bytes {
            return Err(bad(format!(
                "expected a bitmap of {bytes} U8, found {} {}",
                bitmap.elements(),
                bitmap.dtype()
            )));
        }
        if starts.dtype() != Dtype::U64 || starts.elements() != 2 * (n.div_ceil(BLOCK) + 1) {
            return Err(bad(format!(
                "expected {} starts of U64, found {}",
                2 * (n.div_ceil(BLOCK) + 1),
                starts.elements()
            )));
        }
        let palette = match (values.dtype(), part("palette")?) {
            (Dtype::U8, Some(p)) if p.dtype() == Dtype::F32 && p.elements() <= 256 => {
                p.read()?.chunks_exact(4).map(f32::load).collect()
            }
            (Dtype::U8, _) => return Err(bad("values of U8 need a palette of at most 256 F32".into())),
            (Dtype::BF16 | Dtype::F32 | Dtype::F64, None) => Vec::new(),
            (dtype, _) => return Err(bad(format!("values of {dtype} are not defined, or not with a palette"))),
        };
        if escapes.as_ref().is_some_and(|e| e.dtype() != Dtype::F32) {
            return Err(bad("expected escapes of F32".into()));
        }
        let starts: Vec<[u64; 2]> = words(&starts.read()?).chunks_exact(2).map(|w| [w[0], w[1]]).collect();
        let [moved, escaped] = starts.last().copied().unwrap_or_default();
        let grows = starts.windows(2).enumerate().all(|(b, w)| {
            let room = (n - b as u64 * BLOCK).min(BLOCK);
            w[0][0] <= w[1][0] && w[1][0] - w[0][0] <= room && w[0][1] <= w[1][1] && w[1][1] - w[0][1] <= room
        });
        let room = escapes.as_ref().map_or(0, TensorView::elements);
        if starts[0] != [0, 0] || !grows || moved != row.moved || moved > values.elements() || escaped > room {
            return Err(bad("starts does not count the set bits and the escapes".into()));
        }
        Ok(Self { elements: n, bitmap, values, palette, escapes, starts })
    }

    pub(super) fn is_double(&self) -> bool {
        self.values.dtype() == Dtype::F64
    }

    pub(super) fn windows_are_read(&self) -> bool {
        self.bitmap.map().windows_are_read()
    }

    pub(super) fn window_bytes(&self) -> u64 {
        1 + self.values.dtype().size() as u64 + 4
    }

    pub(super) fn prefetch(&self, elements: Range<u64>) {
        let parts = self.parts(&elements);
        self.bitmap.prefetch(parts.bitmap);
        self.values.prefetch(parts.values);
    }

    fn parts(&self, elements: &Range<u64>) -> Parts {
        let first = elements.start / BLOCK;
        let last = elements.end.div_ceil(BLOCK).max(first);
        let (from, to) = (self.starts[first as usize], self.starts[last as usize]);
        Parts {
            bitmap: first * (BLOCK / 8)..(last * (BLOCK / 8)).min(self.bitmap.elements()),
            values: from[0]..to[0],
            escapes: from[1]..to[1],
        }
    }

    pub(super) fn open_on<'a>(&'a self, elements: &Range<u64>, pool: &'a Pool) -> Result<SparseReader<'a>> {
        let parts = self.parts(elements);
        Ok(SparseReader {
            sparse: self,
            bitmap: self.bitmap.window(parts.bitmap.clone(), pool)?,
            values: self.values.window(parts.values.clone(), pool)?,
            escapes: match &self.escapes {
                Some(e) => Some(e.window(parts.escapes.clone(), pool)?),
                None => None,
            },
            from: parts,
        })
    }
}

#[derive(Debug)]
struct Parts {
    bitmap: Range<u64>,
    values: Range<u64>,
    escapes: Range<u64>,
}

/// A sparse tensor opened on whole blocks.
#[derive(Debug)]
pub struct SparseReader<'a> {
    sparse: &'a Sparse,
    bitmap: Window<'a>,
    values: Window<'a>,
    escapes: Option<Window<'a>>,
    from: Parts,
}

impl SparseReader<'_> {
    /// `acc = c * v`, or `acc + c * v`.
    pub(super) fn add<W: Work>(&self, acc: &mut [W], elements: Range<u64>, c: W, first: bool) -> Result<()> {
        if first {
            acc.fill(W::ZERO);
        }
        let mut at = elements.start;
        while at < elements.end {
            let block = at / BLOCK;
            let end = ((block + 1) * BLOCK).min(elements.end);
            let into = (at - elements.start) as usize..(end - elements.start) as usize;
            self.add_block(&mut acc[into], block, at..end, c)?;
            at = end;
        }
        Ok(())
    }

    fn add_block<W: Work>(&self, acc: &mut [W], block: u64, elements: Range<u64>, c: W) -> Result<()> {
        let starts = &self.sparse.starts;
        let [v0, e0] = starts[block as usize];
        let [v1, e1] = starts[block as usize + 1];
        let block_start = block * BLOCK;
        let block_end = (block_start + BLOCK).min(self.sparse.elements);
        let byte = (block_start / 8 - self.from.bitmap.start) as usize;
        let bits = &self.bitmap[byte..];
        // A run may begin inside a block: what stands before it is counted, not decoded.
        let skipped: u64 = set_bits(bits, 0..elements.start - block_start);
        let size = self.sparse.values.dtype().size() as u64;
        let values_at = |v: u64| ((v - self.from.values.start) * size) as usize;
        let skip_to = (v0 + skipped).min(v1);
        let before = &self.values[values_at(v0)..values_at(skip_to)];
        let values = &self.values[values_at(skip_to)..values_at(v1)];
        let escapes: &[u8] = self.escapes.as_deref().unwrap_or(&[]);
        let escape_bytes = |e: u64| ((e - self.from.escapes.start) * 4) as usize;
        let escapes = escapes.get(escape_bytes(e0)..escape_bytes(e1)).unwrap_or(&[]);
        let mut escapes = escapes.chunks_exact(4).map(|b| W::from_f64(f64::from(f32::load(b))));
        let whole = elements == (block_start..block_end);
        let span = elements.start - block_start..elements.end - block_start;
        let left = match self.sparse.values.dtype() {
            Dtype::U8 => {
                let skipped = before.iter().filter(|&&code| code == ESCAPE_CODE).count();
                let mut escapes = escapes.skip(skipped);
                let mut scaled = [W::ZERO; 256];
                for (s, &p) in scaled.iter_mut().zip(&self.sparse.palette) {
                    *s = c * W::from_f64(f64::from(p));
                }
                let codes = self.sparse.palette.len();
                let left = scatter(acc, bits, span, values.iter(), |&code| match code {
                    ESCAPE_CODE => escapes.next().map(|v| c * v),
                    code if usize::from(code) < codes => Some(scaled[usize::from(code)]),
                    _ => None,
                });
                left.map(|n| n + escapes.count())
            }
            Dtype::BF16 => {
                let load = |b: &[u8]| Bf16::load(b);
                let skipped = before.chunks_exact(2).filter(|b| load(b).0 == ESCAPE_BF16).count();
                let mut escapes = escapes.skip(skipped);
                let left = scatter(acc, bits, span, values.chunks_exact(2), |b| match load(b) {
                    Bf16(ESCAPE_BF16) => escapes.next().map(|v| c * v),
                    v => Some(c * W::from_f64(v.widen64())),
                });
                left.map(|n| n + escapes.count())
            }
            Dtype::F32 => {
                scatter(acc, bits, span, values.chunks_exact(4), |b| Some(c * W::from_f64(f64::from(f32::load(b)))))
                    .map(|n| n + escapes.by_ref().count())
            }
            _ => scatter(acc, bits, span, values.chunks_exact(8), |b| Some(c * W::from_f64(f64::load(b))))
                .map(|n| n + escapes.by_ref().count()),
        };
        match left {
            Some(0) => Ok(()),
            Some(_) if !whole => Ok(()),
            _ => Err(Error::format(
                self.sparse.bitmap.map().path(),
                format!(
                    "{:?}: block {block} has another number of set bits, values or escapes than its starts say; the file is damaged",
                    self.sparse.bitmap.entry.name
                ),
            )),
        }
    }
}

fn set_bits(bits: &[u8], span: Range<u64>) -> u64 {
    let whole = (span.end / 8) as usize;
    let mut count: u64 =
        bits[..whole].chunks(8).map(|b| b.iter().map(|b| u64::from(b.count_ones())).sum::<u64>()).sum();
    if !span.end.is_multiple_of(8) {
        count += u64::from((bits[whole] & ((1u8 << (span.end % 8)) - 1)).count_ones());
    }
    count
}

/// Adds a value at every set bit of a span of a block; how many values were left over, or `None` if there were too few.
#[inline(always)]
fn scatter<'v, W: Work, V: ?Sized + 'v>(
    acc: &mut [W],
    bits: &[u8],
    span: Range<u64>,
    mut values: impl ExactSizeIterator<Item = &'v V>,
    mut decode: impl FnMut(&'v V) -> Option<W>,
) -> Option<usize> {
    let mut word_at = span.start / 64 * 64;
    while word_at < span.end {
        let byte = (word_at / 8) as usize;
        let mut chunk = [0u8; 8];
        let n = (bits.len() - byte).min(8);
        chunk[..n].copy_from_slice(&bits[byte..byte + n]);
        let mut word = u64::from_le_bytes(chunk);
        if word_at < span.start {
            word &= u64::MAX << (span.start - word_at);
        }
        if span.end - word_at < 64 {
            word &= (1u64 << (span.end - word_at)) - 1;
        }
        let base = word_at.wrapping_sub(span.start);
        while word != 0 {
            let i = base.wrapping_add(u64::from(word.trailing_zeros())) as usize;
            word &= word - 1;
            acc[i] = acc[i] + decode(values.next()?)?;
        }
        word_at += 64;
    }
    Some(values.len())
}
