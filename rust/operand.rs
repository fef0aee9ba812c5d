//! What can stand in an expression, and how a worker reads a tile of it.
//!
//! A [`Source`] is a tensor, the difference of two, a stored vector, or what an adapter makes of a tensor or adds to it. A [`Term`] is a source with a coefficient, perhaps placed by
//! segments (a row map, another layout of experts) and perhaps replaced by a control. A [`Reader`] is a term opened on one tile.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use crate::bf16::{Element, Work};
use crate::dtype::Dtype;
use crate::philox::{Philox, splitmix64};
use crate::product::{Product, ProductReader};
use crate::simd::dispatch::{self, with_element};
use crate::simd::{Level, kernel};
use crate::store::TensorView;
use crate::store::map::{Pool, Window};
use crate::stream::BLOCK;
use crate::vector::stored::{Stored, StoredReader};
use crate::{Error, Result};

/// A quantity with one value per element.
#[derive(Debug, Clone)]
pub enum Source {
    /// The tensor itself (a point, where a point may stand).
    Tensor(TensorView),
    /// `positive - negative`.
    Difference(TensorView, TensorView),
    /// A tensor of a vector folder.
    Stored(Arc<Stored>),
    /// What an adapter adds to a matrix.
    Product(Arc<Product>),
    /// A tensor with what adapters add to it, one after the other in the work type (a point, where a point may stand).
    Adapted(TensorView, Arc<Vec<Product>>),
}

/// A run of elements: `length` elements of the source from `start` on stand at `at` in the output.
#[derive(Debug, Clone)]
pub struct Segment {
    /// Where in the output.
    pub at: u64,
    /// How many.
    pub length: u64,
    /// From what.
    pub source: Source,
    /// From where in it.
    pub start: u64,
}

/// Where a term's values come from, in the output's own element order.
#[derive(Debug, Clone)]
pub enum Placement {
    /// Element for element.
    Whole(Source),
    /// By runs, sorted by `at`, without overlap; elements that no run covers are zero.
    Segments(Vec<Segment>),
}

impl Placement {
    /// One past the last element that gets something.
    fn end(&self) -> u64 {
        match self {
            Self::Whole(source) => source.elements(),
            Self::Segments(list) => list.last().map_or(0, |s| s.at + s.length),
        }
    }

    /// What stands at some elements: sources, which of their elements, and where the first of those stands.
    fn sources_of(&self, elements: Range<u64>) -> Vec<(&Source, Range<u64>, u64)> {
        match self {
            Self::Whole(source) => vec![(source, elements.clone(), elements.start)],
            Self::Segments(list) => segments_of(list, &elements).map(|(s, from, at)| (&s.source, from, at)).collect(),
        }
    }
}

/// The segments that bring something to some elements, what of their sources they take, and where that stands.
fn segments_of<'s>(
    segments: &'s [Segment],
    elements: &Range<u64>,
) -> impl Iterator<Item = (&'s Segment, Range<u64>, u64)> + use<'s> {
    let Range { start, end } = *elements;
    let first = segments.partition_point(|s| s.at + s.length <= start);
    segments[first..].iter().take_while(move |s| s.at < end).map(move |s| {
        let (from, to) = (s.at.max(start), (s.at + s.length).min(end));
        (s, s.start + (from - s.at)..s.start + (to - s.at), from)
    })
}

/// A control experiment in place of a vector.
#[derive(Debug, Clone)]
pub enum Substitute {
    /// The vector's own values in random places: whole blocks among themselves, then elements inside each block.
    Shuffle {
        /// The seed.
        seed: u64,
        /// The tensor's name, which the generator is keyed by.
        name: String,
        /// Source block of each whole block.
        order: Arc<Vec<u32>>,
    },
    /// Normal noise, scaled to the vector's norm.
    Random {
        /// The seed.
        seed: u64,
        /// The generator.
        generator: Philox,
        /// What a unit normal is multiplied by.
        scale: f64,
    },
}

/// One summand of an expression.
#[derive(Debug, Clone)]
pub struct Term {
    /// What it is multiplied by.
    pub coefficient: f64,
    /// Its values.
    pub placement: Placement,
    /// What stands in its place, if anything.
    pub substitute: Option<Substitute>,
}

impl Source {
    /// Its elements.
    pub fn elements(&self) -> u64 {
        match self {
            Self::Tensor(t) | Self::Difference(t, _) | Self::Adapted(t, _) => t.elements(),
            Self::Stored(s) => s.elements,
            Self::Product(p) => p.elements(),
        }
    }

    /// Whether it is combined in f64.
    pub fn is_double(&self) -> bool {
        match self {
            Self::Tensor(t) => t.dtype() == Dtype::F64,
            Self::Difference(p, n) => p.dtype() == Dtype::F64 || n.dtype() == Dtype::F64,
            Self::Stored(s) => s.is_double(),
            Self::Product(p) => p.is_double(),
            Self::Adapted(t, added) => t.dtype() == Dtype::F64 || added.iter().any(Product::is_double),
        }
    }

    /// Every tensor on disk that it reads element for element, for digests and error messages.
    pub fn tensors(&self) -> Vec<&TensorView> {
        match self {
            Self::Tensor(t) | Self::Adapted(t, _) => vec![t],
            Self::Difference(p, n) => vec![p, n],
            Self::Stored(_) | Self::Product(_) => vec![],
        }
    }

    /// Bytes of a stored vector or of factors; tensors are counted where they are listed.
    pub fn stored_bytes(&self) -> u64 {
        match self {
            Self::Stored(s) => s.bytes,
            Self::Product(p) => p.bytes(),
            Self::Adapted(_, added) => added.iter().map(Product::bytes).sum(),
            _ => 0,
        }
    }

    /// A file that it reads.
    pub fn path(&self) -> PathBuf {
        match self {
            Self::Tensor(t) | Self::Difference(t, _) | Self::Adapted(t, _) => t.map().path().to_path_buf(),
            Self::Stored(s) => s.path.clone(),
            Self::Product(p) => p.factors().next().map(|f| f.map().path().to_path_buf()).unwrap_or_default(),
        }
    }

    /// Whether every element is zero without a look at any.
    pub fn is_zero(&self) -> bool {
        matches!(self, Self::Stored(s) if s.is_zero())
    }

    /// Bytes of windows per element, for the budget where windows are buffers.
    fn window_bytes(&self) -> u64 {
        match self {
            Self::Tensor(t) | Self::Adapted(t, _) => t.dtype().size() as u64,
            Self::Difference(p, n) => (p.dtype().size() + n.dtype().size()) as u64,
            Self::Stored(s) => s.window_bytes(),
            Self::Product(_) => 0,
        }
    }

    fn windows_are_read(&self) -> bool {
        match self {
            Self::Tensor(t) | Self::Difference(t, _) | Self::Adapted(t, _) => t.map().windows_are_read(),
            Self::Stored(s) => s.windows_are_read(),
            Self::Product(_) => false,
        }
    }

    /// Bytes that a worker holds while it has a block of it open, whatever its windows take.
    fn scratch(&self) -> u64 {
        match self {
            Self::Tensor(_) | Self::Difference(..) => 0,
            Self::Stored(s) => s.scratch(),
            Self::Product(p) => p.memory(),
            // The point itself, widened.
            Self::Adapted(_, added) => BLOCK * 8 + added.iter().map(Product::memory).sum::<u64>(),
        }
    }

    /// Whether it is best read a whole block at a time.
    fn by_block(&self) -> bool {
        match self {
            Self::Tensor(_) | Self::Difference(..) => false,
            Self::Stored(s) => s.by_block(),
            Self::Product(_) | Self::Adapted(..) => true,
        }
    }

    fn prefetch(&self, elements: Range<u64>) {
        match self {
            Self::Tensor(t) | Self::Adapted(t, _) => t.prefetch(elements),
            Self::Product(_) => {}
            Self::Difference(p, n) => {
                p.prefetch(elements.clone());
                n.prefetch(elements);
            }
            Self::Stored(s) => s.prefetch(elements),
        }
    }
}

impl Term {
    /// A source as it is, times a coefficient.
    pub fn new(coefficient: f64, source: Source) -> Self {
        Self { coefficient, placement: Placement::Whole(source), substitute: None }
    }

    /// The sources it reads.
    pub fn sources(&self) -> Vec<&Source> {
        match &self.placement {
            Placement::Whole(s) => vec![s],
            Placement::Segments(list) => list.iter().map(|s| &s.source).collect(),
        }
    }

    /// Whether it is combined in f64.
    pub fn is_double(&self) -> bool {
        self.sources().iter().any(|s| s.is_double())
    }

    /// Whether it is best read a whole block at a time.
    pub fn by_block(&self) -> bool {
        self.substitute.is_some()
            || match &self.placement {
                Placement::Whole(source) => source.by_block(),
                Placement::Segments(_) => true,
            }
    }

    /// Whether some of its values have a second part.
    pub fn has_corrections(&self) -> bool {
        self.substitute.is_none()
            && self.sources().iter().any(|s| matches!(s, Source::Stored(s) if s.has_corrections()))
    }

    /// Whether it adds nothing.
    pub fn is_zero(&self) -> bool {
        self.coefficient == 0.0 || self.sources().iter().all(|s| s.is_zero())
    }

    /// Anonymous bytes that a worker holds per element of its tile, and besides.
    pub fn memory(&self) -> (u64, u64) {
        let per_element =
            self.sources().iter().filter(|s| s.windows_are_read()).map(|s| s.window_bytes()).max().unwrap_or(0);
        let open = self.sources().iter().map(|s| s.scratch()).max().unwrap_or(0);
        let scratch = if self.substitute.is_some() { BLOCK * 12 } else { 0 };
        (per_element, scratch + open)
    }

    /// A file that it reads, for messages.
    pub fn path(&self) -> PathBuf {
        self.sources().first().map(|s| s.path()).unwrap_or_default()
    }

    /// Starts reading what a tile will need.
    pub fn prefetch(&self, elements: Range<u64>) {
        if let (Placement::Whole(source), None) = (&self.placement, &self.substitute) {
            source.prefetch(elements);
        }
    }

    /// Opens it on a tile.
    ///
    /// # Errors
    /// [`Error::Io`] if its bytes cannot be read.
    pub fn open<'a, W: Work>(&'a self, elements: Range<u64>, pool: &'a Pool) -> Result<Reader<'a, W>> {
        let kind = match (&self.substitute, &self.placement) {
            (Some(Substitute::Random { generator, scale, .. }), _) => Kind::Random(*generator, *scale),
            (Some(Substitute::Shuffle { seed, name, order }), placement) => Kind::Shuffle(Box::new(Shuffle {
                placement,
                pool,
                seed: *seed,
                name,
                order,
                block: vec![W::ZERO; BLOCK as usize],
                permutation: vec![0; BLOCK as usize],
            })),
            (None, Placement::Whole(source)) => Kind::Straight(Straight::open(source, elements, pool)?),
            (None, Placement::Segments(segments)) => Kind::Segments(segments, pool),
        };
        Ok(Reader { kind, coefficient: W::from_f64(self.coefficient), exact_coefficient: self.coefficient })
    }
}

/// Elements as they lie in a file, and their format.
pub type Typed<'a> = (Dtype, &'a [u8]);

/// A term, opened on a tile.
#[derive(Debug)]
pub struct Reader<'a, W> {
    kind: Kind<'a, W>,
    coefficient: W,
    exact_coefficient: f64,
}

#[derive(Debug)]
enum Kind<'a, W> {
    Straight(Straight<'a>),
    Segments(&'a [Segment], &'a Pool),
    Shuffle(Box<Shuffle<'a, W>>),
    Random(Philox, f64),
}

#[derive(Debug)]
struct Shuffle<'a, W> {
    placement: &'a Placement,
    pool: &'a Pool,
    seed: u64,
    name: &'a str,
    order: &'a [u32],
    block: Vec<W>,
    permutation: Vec<u32>,
}

impl<W: Work> Reader<'_, W> {
    /// `acc = c * v`, or `acc + c * v` when not `first`, over some elements of the tile.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Format`] for a stored vector that contradicts itself.
    pub fn add(&mut self, level: Level, acc: &mut [W], elements: Range<u64>, first: bool) -> Result<()> {
        self.add_times(self.coefficient, level, acc, elements, first)
    }

    /// [`Reader::add`] with another coefficient than the term's.
    ///
    /// # Errors
    /// As [`Reader::add`].
    pub fn add_times(&mut self, c: W, level: Level, acc: &mut [W], elements: Range<u64>, first: bool) -> Result<()> {
        match &mut self.kind {
            Kind::Straight(source) => source.add(level, acc, elements, c, first),
            Kind::Segments(segments, pool) => {
                if first {
                    acc.fill(W::ZERO);
                }
                add_segments(segments, pool, level, acc, elements, c)
            }
            Kind::Shuffle(shuffle) => shuffle.add(level, acc, elements, c, first),
            Kind::Random(generator, scale) => {
                let mut noise = [W::ZERO; kernel::MICRO];
                let mut at = elements.start;
                for acc in acc.chunks_mut(kernel::MICRO) {
                    let noise = &mut noise[..acc.len()];
                    dispatch::normal(level, noise, *generator, at, *scale);
                    dispatch::scaled_work(level, acc, noise, c, first);
                    at += noise.len() as u64;
                }
                Ok(())
            }
        }
    }

    /// The format and the bytes of some elements, where the term is one tensor as it is.
    pub fn plain(&self, elements: &Range<u64>) -> Option<Typed<'_>> {
        match &self.kind {
            Kind::Straight(Straight::Tensor { window, dtype, from }) => {
                Some((*dtype, &window[part(window, *dtype, *from, elements)]))
            }
            _ => None,
        }
    }

    /// Whether [`Reader::plain`] has an answer.
    pub fn is_plain(&self) -> bool {
        matches!(self.kind, Kind::Straight(Straight::Tensor { .. }))
    }

    /// The corrections of a block: positions inside it, and what the coefficient makes of them.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn corrections(&self, block: u64, into: &mut Vec<(u32, f64)>) -> Result<()> {
        match &self.kind {
            Kind::Straight(Straight::Stored(reader)) => reader.corrections(block, self.exact_coefficient, into),
            Kind::Segments(segments, pool) => segment_corrections(segments, pool, block, self.exact_coefficient, into),
            _ => Ok(()),
        }
    }

    /// What it is multiplied by.
    pub fn coefficient(&self) -> W {
        self.coefficient
    }

    /// Some elements of both donors, where the term is the difference of two tensors.
    pub fn donors(&self, elements: &Range<u64>) -> Option<[Typed<'_>; 2]> {
        let Kind::Straight(Straight::Difference { positive, negative, dtypes, from }) = &self.kind else { return None };
        let [p, n] = [(positive, dtypes[0]), (negative, dtypes[1])];
        Some([p, n].map(|(window, dtype)| (dtype, &window[part(window, dtype, *from, elements)])))
    }

    /// The bytes of the tensors that it reads element for element, in the order of [`Source::tensors`].
    pub fn windows(&self) -> Vec<&[u8]> {
        match &self.kind {
            Kind::Straight(Straight::Tensor { window, .. } | Straight::Adapted { window, .. }) => vec![window],
            Kind::Straight(Straight::Difference { positive, negative, .. }) => vec![positive, negative],
            _ => vec![],
        }
    }
}

#[derive(Debug)]
enum Straight<'a> {
    Tensor { window: Window<'a>, dtype: Dtype, from: u64 },
    Difference { positive: Window<'a>, negative: Window<'a>, dtypes: [Dtype; 2], from: u64 },
    Stored(StoredReader<'a>),
    Product(ProductReader),
    Adapted { window: Window<'a>, dtype: Dtype, from: u64, added: Vec<ProductReader> },
}

fn part(bytes: &[u8], dtype: Dtype, from: u64, elements: &Range<u64>) -> Range<usize> {
    let size = dtype.size() as u64;
    let range = (elements.start - from) * size..(elements.end - from) * size;
    debug_assert!(range.end <= bytes.len() as u64);
    range.start as usize..range.end as usize
}

impl<'a> Straight<'a> {
    fn open(source: &'a Source, elements: Range<u64>, pool: &'a Pool) -> Result<Self> {
        let from = elements.start;
        Ok(match source {
            Source::Tensor(t) => Self::Tensor { window: t.window(elements, pool)?, dtype: t.dtype(), from },
            Source::Difference(p, n) => Self::Difference {
                positive: p.window(elements.clone(), pool)?,
                negative: n.window(elements, pool)?,
                dtypes: [p.dtype(), n.dtype()],
                from,
            },
            Source::Stored(s) => Self::Stored(s.open_on(elements, pool)?),
            Source::Product(p) => Self::Product(p.open(elements, pool)?),
            Source::Adapted(t, added) => Self::Adapted {
                window: t.window(elements.clone(), pool)?,
                dtype: t.dtype(),
                from,
                added: added.iter().map(|p| p.open(elements.clone(), pool)).collect::<Result<_>>()?,
            },
        })
    }

    fn add<W: Work>(&self, level: Level, acc: &mut [W], elements: Range<u64>, c: W, first: bool) -> Result<()> {
        match self {
            Self::Tensor { window, dtype, from } => {
                let bytes = &window[part(window, *dtype, *from, &elements)];
                with_element!(*dtype, E => dispatch::scaled::<E, W>(level, acc, bytes, c, first));
            }
            Self::Difference { positive, negative, dtypes, from } => {
                let p = &positive[part(positive, dtypes[0], *from, &elements)];
                let n = &negative[part(negative, dtypes[1], *from, &elements)];
                if dtypes[0] == dtypes[1] {
                    with_element!(dtypes[0], E => dispatch::difference::<E, W>(level, acc, p, n, c, first));
                } else {
                    mixed_difference(level, acc, (p, dtypes[0]), (n, dtypes[1]), c, first);
                }
            }
            Self::Stored(reader) => reader.add(level, acc, elements, c, first)?,
            Self::Product(reader) => reader.add(level, acc, elements, c, first),
            Self::Adapted { window, dtype, from, added } => {
                let bytes = &window[part(window, *dtype, *from, &elements)];
                let mut point = vec![W::ZERO; acc.len()];
                with_element!(*dtype, E => dispatch::widen::<E, W>(level, &mut point, bytes));
                for reader in added {
                    reader.add(level, &mut point, elements.clone(), W::from_f64(1.0), false);
                }
                dispatch::scaled_work(level, acc, &point, c, first);
            }
        }
        Ok(())
    }
}

/// The difference of donors of different formats.
fn mixed_difference<W: Work>(level: Level, acc: &mut [W], p: (&[u8], Dtype), n: (&[u8], Dtype), c: W, first: bool) {
    let mut wide = [W::ZERO; kernel::MICRO];
    let micros = p.0.chunks(kernel::MICRO * p.1.size()).zip(n.0.chunks(kernel::MICRO * n.1.size()));
    for (acc, (p_bytes, n_bytes)) in acc.chunks_mut(kernel::MICRO).zip(micros) {
        let wide = &mut wide[..acc.len()];
        with_element!(p.1, E => dispatch::widen::<E, W>(level, wide, p_bytes));
        with_element!(n.1, E => dispatch::subtract::<E, W>(level, wide, n_bytes));
        dispatch::scaled_work(level, acc, wide, c, first);
    }
}

fn add_segments<W: Work>(
    segments: &[Segment],
    pool: &Pool,
    level: Level,
    acc: &mut [W],
    elements: Range<u64>,
    c: W,
) -> Result<()> {
    for (segment, range, at) in segments_of(segments, &elements) {
        let into = (at - elements.start) as usize..(at - elements.start + range.end - range.start) as usize;
        let reader = Straight::open(&segment.source, range.clone(), pool)?;
        reader.add(level, &mut acc[into], range, c, false)?;
    }
    Ok(())
}

/// The corrections that segments bring into a block.
fn segment_corrections(
    segments: &[Segment],
    pool: &Pool,
    block: u64,
    coefficient: f64,
    into: &mut Vec<(u32, f64)>,
) -> Result<()> {
    let elements = block * BLOCK..(block + 1) * BLOCK;
    let mut found = Vec::new();
    for (segment, taken, place) in segments_of(segments, &elements) {
        let Source::Stored(stored) = &segment.source else { continue };
        for source in taken.start / BLOCK..taken.end.div_ceil(BLOCK) {
            found.clear();
            stored.corrections(source, coefficient, pool, &mut found)?;
            for &(p, correction) in &found {
                let at = source * BLOCK + u64::from(p);
                if taken.contains(&at) {
                    into.push(((place + (at - taken.start) - elements.start) as u32, correction));
                }
            }
        }
    }
    Ok(())
}

/// The corrections of a block by position, those of several terms at one position added in the order of the terms.
///
/// # Errors
/// [`Error::Io`], or [`Error::Format`] for a stored vector that contradicts itself.
pub fn gather_corrections<W: Work>(readers: &[Reader<'_, W>], block: u64, into: &mut Vec<(u32, f64)>) -> Result<()> {
    into.clear();
    for reader in readers {
        reader.corrections(block, into)?;
    }
    if readers.len() > 1 {
        into.sort_by_key(|&(p, _)| p);
        into.dedup_by(|next, kept| {
            let same = next.0 == kept.0;
            if same {
                kept.1 += next.1;
            }
            same
        });
    }
    Ok(())
}

/// Reads whatever a placement puts at some elements, unscaled.
fn read_placement<W: Work>(
    placement: &Placement,
    pool: &Pool,
    level: Level,
    into: &mut [W],
    elements: Range<u64>,
) -> Result<()> {
    let one = W::from_f64(1.0);
    match placement {
        Placement::Whole(source) => {
            Straight::open(source, elements.clone(), pool)?.add(level, into, elements, one, true)
        }
        Placement::Segments(segments) => {
            into.fill(W::ZERO);
            add_segments(segments, pool, level, into, elements, one)
        }
    }
}

impl<W: Work> Shuffle<'_, W> {
    fn add(&mut self, level: Level, acc: &mut [W], elements: Range<u64>, c: W, first: bool) -> Result<()> {
        if !elements.start.is_multiple_of(BLOCK) || acc.len() as u64 > BLOCK {
            return Err(Error::Usage("a shuffled vector is read a block at a time".into()));
        }
        let destination = elements.start / BLOCK;
        let source = self.order.get(destination as usize).map_or(destination, |&b| u64::from(b));
        let n = acc.len();
        let start = source * BLOCK;
        read_placement(self.placement, self.pool, level, &mut self.block[..n], start..start + n as u64)?;
        let generator = Philox::new(self.seed ^ splitmix64(destination + 1), self.name, SHUFFLE);
        generator.permutation(&mut self.permutation[..n]);
        for (acc, &from) in acc.iter_mut().zip(&self.permutation[..n]) {
            let value = c * self.block[from as usize];
            *acc = if first { value } else { *acc + value };
        }
        Ok(())
    }
}

/// Stream numbers keep the uses of one seed apart.
const RANDOM: u64 = 1;
const SHUFFLE: u64 = 2;

impl Substitute {
    /// Norm-matched noise for a tensor whose vector has the sum of squares `vector`.
    pub fn random(seed: u64, name: &str, vector: f64, noise: f64) -> Self {
        let scale = if vector > 0.0 && noise > 0.0 { (vector / noise).sqrt() } else { 0.0 };
        Self::Random { seed, generator: Philox::new(seed, name, RANDOM), scale }
    }

    /// The noise's generator, to measure its norm.
    pub fn generator(seed: u64, name: &str) -> Philox {
        Philox::new(seed, name, RANDOM)
    }

    /// A shuffle of a tensor's elements.
    pub fn shuffle(seed: u64, name: &str, elements: u64) -> Self {
        let mut order = vec![0u32; (elements / BLOCK) as usize];
        Philox::new(seed, name, SHUFFLE).permutation(&mut order);
        Self::Shuffle { seed, name: name.to_owned(), order: Arc::new(order) }
    }
}

const ADVICE: &str =
    "fix the checkpoint, leave the tensor out with --exclude, or pass --allow-nonfinite if it is meant";

const TOO_FAR: &str = "after the other donor was subtracted, both of which are finite there: they are no two checkpoints of one model, or one is damaged";

/// The first NaN or infinity among some elements of tensors and terms, as the error that names it.
///
/// # Errors
/// [`Error::Io`] if they cannot be read again.
pub fn first_nonfinite<W: Work>(
    name: &str,
    tensors: &[&TensorView],
    terms: &[Term],
    level: Level,
    elements: Range<u64>,
    pool: &Pool,
) -> Result<Option<Error>> {
    let mut first = None;
    for view in tensors {
        look_at_tensor(view, elements.clone(), elements.start, pool, &mut first)?;
    }
    for term in terms {
        // What a shuffle puts here comes from anywhere; else from the start of the block, because sparse tensors are read so.
        let shuffled = matches!(term.substitute, Some(Substitute::Shuffle { .. }));
        let (start, end) =
            if shuffled { (0, term.placement.end()) } else { (elements.start / BLOCK * BLOCK, elements.end) };
        let mut at = start;
        while at < end && first.as_ref().is_none_or(|&(index, _)| at <= index) {
            let block = at..(at + BLOCK).min(end);
            let wanted = if shuffled { block.clone() } else { block.start.max(elements.start)..block.end };
            for (source, range, place) in term.placement.sources_of(wanted.clone()) {
                for view in source.tensors() {
                    look_at_tensor(view, range.clone(), place, pool, &mut first)?;
                }
            }
            let mut values = vec![W::ZERO; (block.end - block.start) as usize];
            read_placement(&term.placement, pool, level, &mut values, block.clone())?;
            let here = &values[(wanted.start - block.start) as usize..];
            if let Some(i) = here.iter().position(|v| !v.is_finite()) {
                let index = wanted.start + i as u64;
                // What is wrong in a donor itself was found above.
                let made = term.sources().iter().all(|s| matches!(s, Source::Tensor(_) | Source::Difference(..)));
                let advice = if made { TOO_FAR } else { ADVICE };
                consider(&mut first, index, || nonfinite(term.path(), name, index, here[i].to_f64(), advice));
            }
            at = block.end;
        }
    }
    Ok(first.map(|(_, e)| e))
}

/// Keeps the error of the smallest index; of several at one index the one that was found first.
fn consider(first: &mut Option<(u64, Error)>, index: u64, error: impl FnOnce() -> Error) {
    if first.as_ref().is_none_or(|&(i, _)| index < i) {
        *first = Some((index, error()));
    }
}

fn nonfinite(path: PathBuf, tensor: &str, index: u64, value: f64, advice: &'static str) -> Error {
    Error::NonFinite { path, tensor: tensor.to_owned(), index, value: value.to_string(), advice }
}

/// Looks for a NaN or infinity among some elements, which stand at `place` in the output.
fn look_at_tensor(
    view: &TensorView,
    range: Range<u64>,
    place: u64,
    pool: &Pool,
    first: &mut Option<(u64, Error)>,
) -> Result<()> {
    let bytes = view.window(range.clone(), pool)?;
    with_element!(view.dtype(), E => {
        if let Some((i, e)) = bytes.chunks_exact(E::SIZE).map(E::load).enumerate().find(|(_, e)| !e.finite()) {
            let i = i as u64;
            let path = || view.map().path().to_path_buf();
            consider(first, place + i, || nonfinite(path(), &view.entry.name, range.start + i, e.widen64(), ADVICE));
        }
    });
    Ok(())
}
