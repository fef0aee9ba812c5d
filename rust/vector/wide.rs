//! Corrections: the few elements whose f32 difference does not give the positive donor back.
//!
//! `v = hi + lo`, with `lo` in f64. It happens where an element nearly vanished (its new value is far smaller than its old one, below the last
//! place of the difference) and where only the sign of a zero changed, which `lo = -0.0` or `+0.0` records.

use super::format::Row;
use crate::bf16::Element;
use crate::dtype::Dtype;
use crate::store::map::Pool;
use crate::store::{Checkpoint, TensorView};
use crate::stream::BLOCK;
use crate::{Error, Result};

/// The corrections of one stored tensor.
#[derive(Debug)]
pub struct Wide {
    at: TensorView,
    lo: TensorView,
    starts: Vec<u64>,
    elements: u64,
}

/// `round((t + u) + correction)`, straight from f64; a zero takes the correction's sign.
pub fn corrected<O: Element>(t: f64, u: f64, correction: f64) -> O {
    let sum = (t + u) + correction;
    O::narrow64(if sum == 0.0 { 0f64.copysign(correction) } else { sum })
}

/// The correction that gives `p` back from `n` and the difference `hi`, if there is one.
pub fn correction<O: Element>(p: O, n: f64, hi: f64) -> Option<f64> {
    let target = p.widen64();
    let mut lo = target - (n + hi);
    if lo == 0.0 {
        lo = 0f64.copysign(target);
    }
    corrected::<O>(n, hi, lo).same_bits(p).then_some(lo)
}

impl Wide {
    pub(super) fn open(row: &Row, data: &Checkpoint) -> Result<Option<Self>> {
        let part = |role: &str| row.parts.get(role).map(|p| data.tensor(&p.entry)).transpose();
        let (at, lo, starts) = match (part("wide_at")?, part("wide_lo")?, part("wide_starts")?) {
            (None, None, None) => return Ok(None),
            (Some(a), Some(l), Some(s)) => (a, l, s),
            _ => return Err(Error::Usage("has some of wide_at, wide_lo and wide_starts, but not all".into())),
        };
        let blocks = row.elements.div_ceil(BLOCK);
        if at.dtype() != Dtype::U32 || lo.dtype() != Dtype::F64 || starts.dtype() != Dtype::U64 {
            return Err(Error::Usage("expected wide_at of U32, wide_lo of F64 and wide_starts of U64".into()));
        }
        if starts.elements() != blocks + 1 {
            return Err(Error::Usage(format!("expected {} wide_starts, found {}", blocks + 1, starts.elements())));
        }
        let starts: Vec<u64> = words(&starts.read()?);
        let total = starts.last().copied().unwrap_or(0);
        if starts[0] != 0 || !starts.is_sorted() || total > lo.elements() || total > at.elements() || total != row.wide
        {
            return Err(Error::Usage("wide_starts does not count wide_at and wide_lo".into()));
        }
        Ok(Some(Self { at, lo, starts, elements: row.elements }))
    }

    /// The corrections of a block times a coefficient, added to `into`.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] if their positions do not ascend inside the block.
    pub(super) fn read(&self, block: u64, coefficient: f64, pool: &Pool, into: &mut Vec<(u32, f64)>) -> Result<()> {
        let (start, end) = (self.starts[block as usize], self.starts[block as usize + 1]);
        let at = self.at.window(start..end, pool)?;
        let lo = self.lo.window(start..end, pool)?;
        let room = (self.elements - block * BLOCK).min(BLOCK);
        let mut least = 0;
        for (at, lo) in at.chunks_exact(4).zip(lo.chunks_exact(8)) {
            let position = u32::from_le_bytes([at[0], at[1], at[2], at[3]]);
            if u64::from(position) < least || u64::from(position) >= room {
                let problem = format!(
                    "{:?}: the places of block {block} do not ascend inside it; the file is damaged",
                    self.at.entry.name
                );
                return Err(Error::format(self.at.map().path(), problem));
            }
            least = u64::from(position) + 1;
            let lo = f64::load(lo);
            if !lo.is_finite() {
                let problem = format!(
                    "{:?}: the correction of place {position} of block {block} is {lo}; the file is damaged",
                    self.lo.entry.name
                );
                return Err(Error::format(self.lo.map().path(), problem));
            }
            into.push((position, coefficient * lo));
        }
        Ok(())
    }
}

/// Little-endian 64-bit words.
pub(super) fn words(bytes: &[u8]) -> Vec<u64> {
    bytes.chunks_exact(8).map(|b| u64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]])).collect()
}
