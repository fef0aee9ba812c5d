//! The base and the models of a tensor, opened on some elements and read a little at a time.

use std::ops::Range;

use crate::Result;
use crate::bf16::Work;
use crate::dtype::Dtype;
use crate::operand::Reader;
use crate::simd::Level;
use crate::simd::dispatch::{self, LANES, MICRO, with_element};
use crate::store::map::{Pool, Window};

use super::prepare::Job;

/// What a tile of the output is made of.
pub(super) struct Points<'r, 'a, W> {
    pub(super) level: Level,
    pub(super) base: Option<(Dtype, &'r [u8])>,
    /// Where the base's bytes begin.
    pub(super) from: u64,
    pub(super) readers: &'r mut [Reader<'a, W>],
    /// The format that inputs are rounded to, and differences of them.
    pub(super) steps: Option<Dtype>,
}

/// Bytes of two inputs and of the base that they are less, if there is one.
struct Two<'r> {
    dtype: Dtype,
    bytes: [&'r [u8]; 2],
    base: Option<&'r [u8]>,
}

/// The windows and readers behind [`Points`].
pub(super) struct Opened<'a, W> {
    level: Level,
    base: Option<(Dtype, Window<'a>)>,
    from: u64,
    readers: Vec<Reader<'a, W>>,
    steps: Option<Dtype>,
}

impl<'a, W: Work> Opened<'a, W> {
    /// Opens some elements of everything that a tensor is made of.
    pub(super) fn new(level: Level, job: &'a Job, elements: &Range<u64>, pool: &'a Pool) -> Result<Self> {
        let base = match &job.target {
            Some((_, t)) => Some((t.dtype(), t.window(elements.clone(), pool)?)),
            None => None,
        };
        let mut readers = Vec::with_capacity(job.terms.len());
        for term in &job.terms {
            readers.push(term.open::<W>(elements.clone(), pool)?);
        }
        Ok(Self { level, base, from: elements.start, readers, steps: job.steps })
    }

    pub(super) fn points(&mut self) -> Points<'_, 'a, W> {
        Points {
            level: self.level,
            base: self.base.as_ref().map(|(d, w)| (*d, &**w)),
            from: self.from,
            readers: &mut self.readers,
            steps: self.steps,
        }
    }
}

impl<W: Work> Points<'_, '_, W> {
    /// The base; zero where there is none.
    pub(super) fn base(&self, into: &mut [W], elements: &Range<u64>) {
        let Some((dtype, bytes)) = self.base else { return into.fill(W::ZERO) };
        let at = |i: u64| (i - self.from) as usize * dtype.size();
        let bytes = &bytes[at(elements.start)..at(elements.end)];
        with_element!(dtype, E => dispatch::widen::<E, W>(self.level, into, bytes));
    }

    /// A model.
    pub(super) fn model(&mut self, i: usize, into: &mut [W], elements: &Range<u64>) -> Result<()> {
        self.readers[i].add_times(W::from_f64(1.0), self.level, into, elements.clone(), true)
    }

    /// A model's bytes and the base's, where both are tensors of one format, and their difference is taken as it is.
    pub(super) fn pair(&self, i: usize, elements: &Range<u64>) -> Option<(Dtype, [&[u8]; 2])> {
        let (dtype, base) = self.base.filter(|_| self.steps.is_none())?;
        let (own, bytes) = self.readers[i].plain(elements)?;
        let at = |i: u64| (i - self.from) as usize * dtype.size();
        (own == dtype).then(|| (dtype, [bytes, &base[at(elements.start)..at(elements.end)]]))
    }

    /// A model less the base, or the model where there is none. Whether all of it is finite. The base may be widened on the way.
    pub(super) fn input(&mut self, i: usize, into: &mut [W], base: &mut [W], elements: &Range<u64>) -> Result<bool> {
        Ok(W::from_magnitude(self.input_and_largest(i, into, base, elements)?).is_finite())
    }

    /// [`Points::input`], and its largest magnitude.
    pub(super) fn input_and_largest(
        &mut self,
        i: usize,
        into: &mut [W],
        base: &mut [W],
        elements: &Range<u64>,
    ) -> Result<W::Magnitude> {
        if let Some((dtype, pair)) = self.pair(i, elements) {
            return Ok(with_element!(dtype, E => dispatch::apart::<E, W>(self.level, into, pair)));
        }
        if let Some((dtype, bytes)) = self.alone(i, elements) {
            return Ok(with_element!(dtype, E => dispatch::widen_largest::<E, W>(self.level, into, bytes)));
        }
        self.model(i, into, elements)?;
        round(self.level, into, self.steps);
        let largest = if self.base.is_some() {
            self.base(base, elements);
            round(self.level, base, self.steps);
            dispatch::less(self.level, into, base)
        } else {
            dispatch::largest(self.level, into)
        };
        round(self.level, into, self.steps);
        Ok(largest)
    }

    /// The first two inputs, where they are tensors of one format, and taken as they are.
    fn two(&self, elements: &Range<u64>) -> Option<Two<'_>> {
        if let (Some((dtype, [a, base])), Some((_, [b, _]))) = (self.pair(0, elements), self.pair(1, elements)) {
            return Some(Two { dtype, bytes: [a, b], base: Some(base) });
        }
        let ((dtype, a), (other, b)) = (self.alone(0, elements)?, self.alone(1, elements)?);
        (dtype == other).then_some(Two { dtype, bytes: [a, b], base: None })
    }

    /// The products of two inputs over at most MICRO elements: of the first with itself, of both, of the second with itself; where no buffer is needed
    /// for that.
    pub(super) fn products(&self, elements: &Range<u64>) -> Option<[f64; 3]> {
        let Two { dtype, bytes, base } = self.two(elements)?;
        Some(with_element!(dtype, E => dispatch::products::<E, W>(self.level, bytes, base)))
    }

    /// `acc = c_1 input_1 + c_2 input_2`, where no buffer is needed for that; whether it was so.
    pub(super) fn blend(&self, acc: &mut [W], elements: &Range<u64>, c: [W; 2]) -> bool {
        let Some(Two { dtype, bytes, base }) = self.two(elements) else { return false };
        with_element!(dtype, E => dispatch::blend::<E, W>(self.level, acc, bytes, base, c));
        true
    }

    /// A model's bytes, where there is no base and it is taken as it is.
    fn alone(&self, i: usize, elements: &Range<u64>) -> Option<(Dtype, &[u8])> {
        self.readers[i].plain(elements).filter(|_| self.base.is_none() && self.steps.is_none())
    }

    /// `acc = c * input`, or `acc + c * input` when not `first`, where no buffer is needed for that; whether it was so.
    pub(super) fn add_plain(&self, i: usize, acc: &mut [W], elements: &Range<u64>, c: W, first: bool) -> bool {
        if let Some((dtype, [p, n])) = self.pair(i, elements) {
            with_element!(dtype, E => dispatch::difference::<E, W>(self.level, acc, p, n, c, first));
            return true;
        }
        let Some((dtype, bytes)) = self.alone(i, elements) else { return false };
        with_element!(dtype, E => dispatch::scaled::<E, W>(self.level, acc, bytes, c, first));
        true
    }

    /// Some elements in pieces whose buffers fit the first-level cache together; but what is costly to begin is read a MICRO at a time.
    pub(super) fn spans(&self, elements: &Range<u64>) -> impl Iterator<Item = Range<u64>> + use<W> {
        let span = if self.readers.iter().all(Reader::is_plain) { SPAN } else { MICRO };
        let Range { start, end } = *elements;
        (start..end).step_by(span).map(move |at| at..(at + span as u64).min(end))
    }
}

/// Rounds to a format, if one is given.
pub(super) fn round<W: Work>(level: Level, x: &mut [W], steps: Option<Dtype>) {
    if let Some(dtype) = steps {
        with_element!(dtype, E => dispatch::round::<E, W>(level, x));
    }
}

/// Elements that are taken through all steps of a method before the next.
const SPAN: usize = 1024;

/// The buffers of a worker: [`MICRO`] elements each.
#[derive(Debug, Default)]
pub(super) struct Lanes<W> {
    pub(super) base: Vec<W>,
    pub(super) inputs: Vec<Vec<W>>,
    pub(super) more: [Vec<W>; 3],
    /// Sums of products, lane by lane.
    pub(super) sums: Vec<[f64; LANES]>,
    /// Whether an input has been anything else than zero.
    pub(super) moved: Vec<bool>,
}

impl<W: Work> Lanes<W> {
    /// Makes room for so many inputs.
    pub(super) fn fit(&mut self, inputs: usize) {
        let full = |v: &mut Vec<W>| v.resize(MICRO.max(v.len()), W::ZERO);
        full(&mut self.base);
        self.more.iter_mut().for_each(full);
        self.inputs.resize_with(inputs.max(self.inputs.len()), Vec::new);
        self.inputs.iter_mut().for_each(full);
        self.moved.resize(self.inputs.len(), false);
    }

    /// Bytes that so many inputs take.
    pub(super) fn memory(inputs: usize) -> u64 {
        ((inputs + 4) * MICRO * size_of::<W>()) as u64
    }
}

/// What a family makes of a tile: the update of its target.
pub(super) trait Update<W: Work> {
    /// Called before the first element of a block.
    fn begin(&mut self, _points: &mut Points<'_, '_, W>, _block: Range<u64>) -> Result<()> {
        Ok(())
    }

    /// Called behind the last element of a block.
    fn end(&mut self, _block: u64) {}

    /// Two tensors of the base's format and a coefficient, where the update of at most MICRO elements is that of their difference.
    fn difference<'r>(&self, _points: &'r Points<'_, '_, W>, _elements: &Range<u64>) -> Option<([&'r [u8]; 2], W)> {
        None
    }

    /// The update of some elements. Whether every input was finite, as far as the output may not show it.
    fn make(&mut self, points: &mut Points<'_, '_, W>, u: &mut [W], elements: Range<u64>) -> Result<bool>;
}
