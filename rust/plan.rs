//! What a caller asks for, as data: the same JSON goes from Python to the core, into the journal's fingerprint, and to another machine.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::bf16::Work;
use crate::dtype::{Class, Dtype};
use crate::operand::{Placement, Segment, Source, Substitute, Term, first_nonfinite};
use crate::product::Product;
use crate::simd::{Level, dispatch};
use crate::store::map::Pool;
use crate::store::{Algorithm, Checkpoint, TensorView};
use crate::stream::{BLOCK, Budget, Control, Grid, pass};
use crate::vector::VectorFolder;
use crate::{Error, Result};

/// A tensor of an operand.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ref {
    /// The operand's number.
    pub operand: usize,
    /// The tensor's name in it.
    pub name: String,
}

/// See [`Source`].
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SourcePlan {
    /// A tensor of a checkpoint.
    Tensor(Ref),
    /// Positive minus negative.
    Difference([Ref; 2]),
    /// A tensor of a vector folder.
    Stored(Ref),
    /// What an adapter adds.
    Product(ProductPlan),
    /// A tensor of a checkpoint with what adapters add to it.
    Adapted {
        /// The tensor.
        tensor: Ref,
        /// What is added, in this order.
        adapters: Vec<AdapterPlan>,
    },
}

/// What an adapter adds to a matrix: `scale * b @ a`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AdapterPlan {
    /// [rank, in]. None: `b` is added as it is, times `scale`.
    #[serde(default)]
    pub a: Option<Ref>,
    /// [out, rank].
    pub b: Ref,
    /// Times the product.
    pub scale: f64,
    /// Whether the matrix is stored as [in, out].
    #[serde(default)]
    pub transposed: bool,
}

/// [`AdapterPlan`], by itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ProductPlan {
    /// The factors.
    #[serde(flatten)]
    pub adapter: AdapterPlan,
    /// Rows of the matrix as it is stored; of a tensor that is none, its elements.
    pub rows: u64,
    /// Columns; 1 for a tensor that is no matrix.
    pub columns: u64,
}

/// See [`Segment`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SegmentPlan {
    /// Where in the output.
    pub at: u64,
    /// How many elements.
    pub length: u64,
    /// From what.
    pub source: SourcePlan,
    /// From where in it.
    pub start: u64,
}

/// A control experiment.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "kind")]
pub enum ControlPlan {
    /// Norm-matched noise.
    Random {
        /// The seed.
        seed: u64,
    },
    /// The same values elsewhere.
    Shuffle {
        /// The seed.
        seed: u64,
    },
}

/// See [`Term`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TermPlan {
    /// What it is multiplied by.
    pub coefficient: f64,
    /// The source, element for element; or `segments`.
    #[serde(default)]
    pub source: Option<SourcePlan>,
    /// The source, by runs.
    #[serde(default)]
    pub segments: Option<Vec<SegmentPlan>>,
    /// A control in its place.
    #[serde(default)]
    pub control: Option<ControlPlan>,
}

/// How to run, as opposed to what: nothing here changes a byte of the output.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Settings {
    /// Workers at most; 0 for the number of processors.
    #[serde(default)]
    pub threads: usize,
    /// Bytes that the workers may hold together.
    pub memory_budget: u64,
    /// Whether files are synced before they get their final names.
    #[serde(default = "yes")]
    pub sync: bool,
    /// Whether to continue an unfinished run.
    #[serde(default)]
    pub resume: bool,
}

fn yes() -> bool {
    true
}

impl Default for Settings {
    fn default() -> Self {
        Self { threads: 0, memory_budget: 64 << 20, sync: true, resume: false }
    }
}

impl Settings {
    /// Workers at most.
    pub fn threads(&self) -> usize {
        match self.threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            n => n,
        }
    }
}

/// Something opened that plans refer to by number.
#[derive(Debug, Clone)]
pub enum Operand {
    /// A checkpoint.
    Checkpoint(Arc<Checkpoint>),
    /// A vector folder.
    Vector(Arc<VectorFolder>),
}

/// The operands of a plan.
#[derive(Debug, Clone, Copy)]
pub struct Operands<'a>(pub &'a [Operand]);

impl Operands<'_> {
    fn operand(&self, r: &Ref) -> Result<&Operand> {
        self.0.get(r.operand).ok_or_else(|| {
            Error::mismatch(&r.name, format!("the plan names operand {}, there are {}", r.operand, self.0.len()))
        })
    }

    /// A tensor of a checkpoint.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if it is not there.
    pub fn tensor(&self, r: &Ref) -> Result<TensorView> {
        match self.operand(r)? {
            Operand::Checkpoint(c) => c.tensor(&r.name),
            Operand::Vector(v) => Err(Error::mismatch(
                &r.name,
                format!("{} is a vector, a checkpoint is needed here", v.path().display()),
            )),
        }
    }

    /// A source, with its parts checked against each other.
    ///
    /// # Errors
    /// [`Error::Mismatch`] for tensors that are not there, differ in shape, or hold no floats.
    pub fn source(&self, plan: &SourcePlan) -> Result<Source> {
        Ok(match plan {
            SourcePlan::Tensor(r) => Source::Tensor(float(self.tensor(r)?)?),
            SourcePlan::Difference([p, n]) => {
                let (p, n) = (float(self.tensor(p)?)?, float(self.tensor(n)?)?);
                if p.entry.shape != n.entry.shape {
                    return Err(Error::mismatch(
                        &p.entry.name,
                        format!(
                            "the donors' shapes differ: {:?} in {}, {:?} in {}",
                            p.entry.shape,
                            p.map().path().display(),
                            n.entry.shape,
                            n.map().path().display()
                        ),
                    ));
                }
                Source::Difference(p, n)
            }
            SourcePlan::Product(ProductPlan { adapter, rows, columns }) => {
                let mut shape = vec![*rows, *columns];
                if adapter.a.is_none() {
                    shape = self.tensor(&adapter.b)?.entry.shape;
                    let elements = elements(&shape, &adapter.b.name)?;
                    if Some(elements) != rows.checked_mul(*columns) {
                        return Err(Error::mismatch(
                            &adapter.b.name,
                            format!("has {elements} elements, the plan says {rows} x {columns}"),
                        ));
                    }
                }
                Source::Product(Arc::new(self.product(adapter, &shape)?))
            }
            SourcePlan::Adapted { tensor, adapters } => {
                let tensor = float(self.tensor(tensor)?)?;
                let products = adapters.iter().map(|a| self.product(a, &tensor.entry.shape)).collect::<Result<_>>()?;
                Source::Adapted(tensor, Arc::new(products))
            }
            SourcePlan::Stored(r) => match self.operand(r)? {
                Operand::Vector(v) => Source::Stored(v.tensor(&r.name)?),
                Operand::Checkpoint(c) => {
                    return Err(Error::mismatch(
                        &r.name,
                        format!("{} is a checkpoint, a vector is needed here", c.path().display()),
                    ));
                }
            },
        })
    }

    /// What an adapter adds to a tensor of a shape.
    fn product(&self, plan: &AdapterPlan, shape: &[u64]) -> Result<Product> {
        let b = float(self.tensor(&plan.b)?)?;
        let name = b.entry.name.clone();
        let a = plan.a.as_ref().map(|a| float(self.tensor(a)?)).transpose()?;
        // The rows of the transpose are the columns of A.
        let (left, right) = match a {
            Some(a) if plan.transposed => (a, Some(b)),
            a => (b, a),
        };
        if !plan.scale.is_finite() {
            return Err(Error::mismatch(&name, format!("a scale of {} is no number", plan.scale)));
        }
        Product::new(left, right, plan.transposed, Vec::new(), plan.scale, shape)
            .map_err(|problem| Error::mismatch(&name, problem))
    }

    /// A term of a tensor with some elements. A random control is left unscaled: [`scale_noise`] measures it.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if the term does not fit the tensor.
    pub fn term(&self, plan: &TermPlan, name: &str, elements: u64) -> Result<Term> {
        let placement = match (&plan.source, &plan.segments) {
            (Some(source), None) => {
                let source = self.source(source)?;
                if source.elements() != elements {
                    return Err(Error::mismatch(
                        name,
                        format!(
                            "the vector has {} elements here, the target {elements}; see the vocabulary and layout policies",
                            source.elements()
                        ),
                    ));
                }
                Placement::Whole(source)
            }
            (None, Some(segments)) => {
                let mut list = Vec::with_capacity(segments.len());
                let mut at = 0;
                for s in segments {
                    let source = self.source(&s.source)?;
                    let end = s.at.checked_add(s.length).filter(|&e| s.at >= at && e <= elements);
                    let from = s.start.checked_add(s.length).filter(|&e| e <= source.elements());
                    if end.is_none() || from.is_none() {
                        return Err(Error::mismatch(
                            name,
                            format!("segment {}..+{} from {} is out of order or out of range", s.at, s.length, s.start),
                        ));
                    }
                    at = s.at + s.length;
                    list.push(Segment { at: s.at, length: s.length, source, start: s.start });
                }
                Placement::Segments(list)
            }
            _ => return Err(Error::mismatch(name, "a term has either a source or segments")),
        };
        let substitute = plan.control.map(|c| match c {
            ControlPlan::Random { seed } => Substitute::random(seed, name, 0.0, 0.0),
            ControlPlan::Shuffle { seed } => Substitute::shuffle(seed, name, elements),
        });
        Ok(Term { coefficient: plan.coefficient, placement, substitute })
    }

    /// Checks the digests of every stored vector among the operands.
    ///
    /// # Errors
    /// [`Error::Damage`] for the first part whose bytes are not those that were written.
    pub fn verify_vectors(&self, settings: &Settings, control: &Control) -> Result<()> {
        for operand in self.0 {
            if let Operand::Vector(v) = operand {
                crate::inspect::verify_vector(v, settings, control)?;
            }
        }
        Ok(())
    }
}

fn float(tensor: TensorView) -> Result<TensorView> {
    match tensor.dtype().class() {
        Class::Float => Ok(tensor),
        Class::Exact => Err(Error::mismatch(
            &tensor.entry.name,
            format!(
                "is {} in {}; integers and booleans are copied, never added",
                tensor.dtype(),
                tensor.map().path().display()
            ),
        )),
        Class::Refused => Err(Error::mismatch(
            &tensor.entry.name,
            format!(
                "is {} in {}: codes without meaning until they are multiplied by their scales; dequantise the checkpoint first",
                tensor.dtype(),
                tensor.map().path().display()
            ),
        )),
    }
}

/// Norm-matched noise that waits for its scale.
#[derive(Debug)]
pub struct Noise<'t> {
    name: String,
    elements: u64,
    double: bool,
    seed: u64,
    term: &'t mut Term,
}

/// The random controls among some terms of a tensor that is combined in f64, or (not `double`) in f32.
pub fn noises<'t>(
    name: &str,
    elements: u64,
    double: bool,
    terms: impl IntoIterator<Item = &'t mut Term>,
) -> Vec<Noise<'t>> {
    let random = |term: &'t mut Term| match term.substitute {
        Some(Substitute::Random { seed, .. }) => Some(Noise { name: name.to_owned(), elements, double, seed, term }),
        _ => None,
    };
    terms.into_iter().filter_map(random).collect()
}

/// Measures the vectors that norm-matched noise stands in for, and the noise, and sets the scales. One pass over those vectors.
///
/// # Errors
/// Whatever reading them fails with; [`Error::NonFinite`], which noise would hide, unless it is allowed.
pub fn scale_noise(
    noises: Vec<Noise<'_>>,
    allow_nonfinite: bool,
    settings: &Settings,
    control: &Control,
) -> Result<()> {
    if noises.is_empty() {
        return Ok(());
    }
    let level = Level::current()?;
    let grid = Grid::new(noises.iter().map(|n| n.elements).collect(), 1);
    let sums: Vec<std::sync::Mutex<Vec<[f64; 2]>>> =
        (0..noises.len()).map(|i| vec![[0.0; 2]; grid.tiles_of(i)].into()).collect();
    let plain: Vec<Term> = noises
        .iter()
        .map(|n| Term { coefficient: 1.0, placement: n.term.placement.clone(), substitute: None })
        .collect();
    let budget = Budget::share(settings.memory_budget, settings.threads(), BLOCK * 16, BLOCK * 8, 1);
    pass::run(
        &grid,
        budget.threads,
        control,
        || (Pool::default(), Vec::<f32>::new(), Vec::<f64>::new()),
        |tile| plain[tile.tensor].prefetch(tile.elements.clone()),
        |(pool, single, double), _, tile| {
            let (noise, term) = (&noises[tile.tensor], std::slice::from_ref(&plain[tile.tensor]));
            let range = tile.elements.clone();
            let vector = if noise.double {
                squares(&noise.name, term, level, range.clone(), pool, double, allow_nonfinite)?
            } else {
                squares(&noise.name, term, level, range.clone(), pool, single, allow_nonfinite)?
            };
            double.resize((range.end - range.start) as usize, 0.0);
            dispatch::normal(level, double, Substitute::generator(noise.seed, &noise.name), range.start, 1.0);
            let block = (range.start / BLOCK) as usize;
            sums[tile.tensor].lock().unwrap_or_else(std::sync::PoisonError::into_inner)[block] =
                [vector, sum_of_squares(level, double)];
            Ok(())
        },
    )?;
    for (noise, sums) in noises.into_iter().zip(sums) {
        let sums = sums.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        let (v, z) = sums.iter().fold((0.0, 0.0), |(v, z), s| (v + s[0], z + s[1]));
        noise.term.substitute = Some(Substitute::random(noise.seed, &noise.name, v, z));
    }
    Ok(())
}

fn sum_of_squares<W: Work>(level: Level, x: &[W]) -> f64 {
    x.chunks(dispatch::MICRO).map(|m| dispatch::dot(level, m, m)).sum()
}

/// The sum of squares of one term over some elements.
fn squares<W: Work>(
    name: &str,
    term: &[Term],
    level: Level,
    range: std::ops::Range<u64>,
    pool: &Pool,
    buffer: &mut Vec<W>,
    allow_nonfinite: bool,
) -> Result<f64> {
    buffer.resize((range.end - range.start) as usize, W::ZERO);
    term[0].open::<W>(range.clone(), pool)?.add(level, buffer, range.clone(), true)?;
    let sum = sum_of_squares(level, buffer);
    if !sum.is_finite()
        && !allow_nonfinite
        && let Some(error) = first_nonfinite::<W>(name, &[], term, level, range, pool)?
    {
        return Err(error);
    }
    Ok(sum)
}

/// Refuses a plan that makes two things of one name.
///
/// # Errors
/// [`Error::Mismatch`], which names it.
pub fn distinct<'n>(names: impl IntoIterator<Item = &'n str>) -> Result<()> {
    let mut seen = std::collections::HashSet::new();
    match names.into_iter().find(|name| !seen.insert(*name)) {
        Some(name) => Err(Error::mismatch(name, "the plan makes it twice; one of them needs another name")),
        None => Ok(()),
    }
}

/// The format of a name in a plan.
///
/// # Errors
/// [`Error::Mismatch`] if it is unknown.
pub fn dtype(name: &str, tensor: &str) -> Result<Dtype> {
    Dtype::parse(name).ok_or_else(|| Error::mismatch(tensor, format!("unknown format {name:?}")))
}

/// The elements of a shape in a plan.
///
/// # Errors
/// [`Error::Mismatch`] if they, or their bytes in any format, are more than can be counted.
pub fn elements(shape: &[u64], tensor: &str) -> Result<u64> {
    let elements = shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d)).filter(|n| n.checked_mul(16).is_some());
    elements.ok_or_else(|| Error::mismatch(tensor, format!("the shape {shape:?} overflows")))
}

/// What digests of a plan's inputs are made with.
pub fn default_algorithm() -> Algorithm {
    Algorithm::Xxh3
}
