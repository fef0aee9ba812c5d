//! Leading singular triplets of a matrix on disk: randomised block Krylov iteration.
//!
//! One sweep over the panels of `A` makes `Y = A V` and `W = A^T Y` together, so a sweep does the work of two passes of the range finder of Halko, Martinsson
//! and Tropp ("Finding structure with randomness", SIAM Review 2011), and four sweeps with blocks of `r / 2` vectors leave less than
//! three power passes with blocks of `r + 8` (the Krylov space holds every polynomial that a power pass holds one of: Musco and Musco, "Randomized block
//! Krylov methods", NeurIPS 2015).
//!
//! With `Y = A V` of all blocks, the projection of `A` on the range of `Y` is found from the small matrices `Y^T Y` and `W^T W` alone. They are squares, so singular values below [`CLEAR`] times the first are inexact in f32: where one of those is wanted, `Y` is made
//! orthonormal and one more sweep takes `A^T Q`.

use std::sync::{Mutex, OnceLock, PoisonError};

use super::dense::{self, add_product, cholesky, combine, cross, invert_triangle, orthonormalise, product, transpose};
use super::eigen::symmetric;
use super::panel::{self, Scratch};
use super::scale::Scale;
use super::thin::{finish, signs};
use super::{Matrix, Rank, Triplets, gram};
use crate::philox::Philox;
use crate::plan::Settings;
use crate::simd::{Level, dispatch};
use crate::stream::{BLOCK, Control, Grid, Turn, pass};
use crate::{Error, Result};

/// Sweeps of the Krylov iteration: of small matrices, whose singular values lie further apart in proportion, two more, which cost little.
fn depth(small: usize) -> usize {
    if small < SMALL { 6 } else { 4 }
}

/// What a small matrix is.
const SMALL: usize = 1280;
/// Vectors of a block are a multiple of this.
const STEP: usize = 16;
/// Elements that are multiplied before sums are joined.
const RUN: usize = 256;
/// Elements of a panel, about: it stays in the second-level cache between its two products.
const PANEL: usize = 1 << 17;
/// Bytes that reading takes a worker, about.
const SCRATCH: u64 = 1 << 20;
/// Sums over rows go in at most so many parts.
const SEGMENTS: usize = 64;
/// Singular values below this share of the first are not read off squares.
const CLEAR: f64 = 0.02;

/// Uses of a seed, apart from those of controls.
const TEST: u64 = 16;
const SIGNS: u64 = 17;
pub(super) const FRESH: u64 = 18;

/// How a matrix is cut into panels, by its shape alone.
pub(super) struct Cut {
    /// Rows of a panel.
    pub(super) height: usize,
    /// Panels of a segment.
    per_segment: usize,
    /// Segments.
    segments: usize,
}

impl Cut {
    fn height(columns: usize) -> usize {
        (PANEL / columns / 12).clamp(2, 20) * 12
    }

    pub(super) fn new(matrix: &Matrix<'_>) -> Self {
        let height = Self::height(matrix.columns);
        let panels = matrix.rows.div_ceil(height);
        let per_segment = panels.div_ceil(SEGMENTS);
        Self { height, per_segment, segments: panels.div_ceil(per_segment) }
    }
}

/// A matrix, how to go over it, and whether with random signs.
pub(super) struct Sweep<'a> {
    pub(super) matrix: &'a Matrix<'a>,
    pub(super) level: Level,
    pub(super) settings: &'a Settings,
    pub(super) control: &'a Control,
    signs: Option<Philox>,
    /// Known after the first reading.
    scale: OnceLock<Scale>,
    /// The sum of squares at that scale, which the first whole reading makes.
    squares: OnceLock<f64>,
    /// Workers between two sweeps: the system takes long to give memory anew.
    workers: Mutex<Vec<Worker>>,
}

/// What a worker of a sweep holds.
#[derive(Default)]
struct Worker {
    scratch: (Scratch<f32>, Scratch<f64>),
    panel: Vec<f32>,
    sums: Vec<f32>,
}

impl Worker {
    /// Bytes of a panel and of the sums for `b` vectors.
    fn bytes(columns: usize, height: usize, b: usize) -> u64 {
        4 * (columns * (height + b)) as u64
    }
}

/// A worker at work, which comes home afterwards.
struct Hired<'a> {
    worker: Worker,
    home: &'a Mutex<Vec<Worker>>,
}

impl<'a> Hired<'a> {
    fn from(home: &'a Mutex<Vec<Worker>>) -> Self {
        let worker = home.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default();
        Self { worker, home }
    }
}

impl Drop for Hired<'_> {
    fn drop(&mut self) {
        self.home.lock().unwrap_or_else(PoisonError::into_inner).push(std::mem::take(&mut self.worker));
    }
}

impl<'a> Sweep<'a> {
    pub(super) fn new(matrix: &'a Matrix<'a>, settings: &'a Settings, control: &'a Control) -> Result<Self> {
        Ok(Self {
            matrix,
            level: Level::current()?,
            settings,
            control,
            signs: None,
            scale: OnceLock::new(),
            squares: OnceLock::new(),
            workers: Mutex::default(),
        })
    }

    /// Threads for work in memory.
    fn threads(&self) -> usize {
        self.settings.threads()
    }

    /// What elements are multiplied by as they are read: by one until the first reading shows that the matrix is of unusual size.
    pub(super) fn scale(&self) -> Scale {
        self.scale.get().copied().unwrap_or_default()
    }

    /// Whether the matrix is to be read again, at another scale: asked of its sum of squares after every reading, true once at most.
    ///
    /// # Errors
    /// As [`panel::largest`].
    pub(super) fn rescaled(&self, squares: f64) -> Result<bool> {
        if self.scale.get().is_some() {
            return Ok(false);
        }
        // A sum of zero may be one of squares that were too small.
        let usual = Scale::is_usual(squares) || self.matrix.terms.is_empty();
        let scale = if usual {
            Scale::default()
        } else {
            Scale::of(panel::largest(self.matrix, self.level, self.threads(), self.control)?)
        };
        Ok(*self.scale.get_or_init(|| scale) != Scale::default())
    }

    /// Singular values of the matrix from those at the sweep's scale.
    ///
    /// # Errors
    /// [`Error::Mismatch`] for one that is not finite.
    pub(super) fn restored_values(&self, mut s: Vec<f64>) -> Result<Vec<f64>> {
        let scale = self.scale();
        s.iter_mut().for_each(|s| *s = scale.divide(*s));
        if s.iter().all(|s| s.is_finite()) { Ok(s) } else { Err(self.too_large()) }
    }

    /// The same of the sum of squares.
    pub(super) fn restored_squares(&self, squares: f64) -> Result<f64> {
        let squares = self.scale().divide_square(squares);
        if squares.is_finite() { Ok(squares) } else { Err(self.too_large()) }
    }

    fn too_large(&self) -> Error {
        Error::mismatch(
            self.matrix.name,
            "has singular values, or a sum of their squares, that f64 does not hold; multiply the vector by a small number first",
        )
    }

    fn restored(&self, found: Triplets) -> Result<Triplets> {
        let residual = self.scale().divide(found.residual);
        let (s, squares) = (self.restored_values(found.s)?, self.restored_squares(found.squares)?);
        Ok(Triplets { s, squares, residual, ..found })
    }

    /// `y = A v` (not if `v` is empty: then `y` is taken as given) and `A^T y`, `b` vectors each, and the sum of squares of `A`. `v` is `columns x b`, `y`
    /// is `rows x b`, the result `b x columns`. Panels are taken from the last to the first if `backward` is set: caches still have those that
    /// the sweep before this one ended with.
    fn products(&self, v: &[f32], y: &mut [f32], b: usize, backward: bool) -> Result<(Vec<f64>, f64)> {
        let Matrix { rows, columns: n, .. } = *self.matrix;
        let cut = Cut::new(self.matrix);
        let (level, scale, known) = (self.level, self.scale(), self.squares.get().copied());
        let held = Worker::bytes(n, cut.height, b);
        let threads = self.threads().min((self.settings.memory_budget / held).max(1) as usize);
        let parts: Vec<Mutex<&mut [f32]>> = y.chunks_mut(cut.per_segment * cut.height * b).map(Mutex::new).collect();
        let total = Mutex::new((vec![0.0f64; b * n], 0.0f64));
        let turn = Turn::default();
        let share = self.matrix.bytes() / cut.segments as u64;
        let segment = |worker: &mut Worker, number: usize| -> Result<()> {
            let place = if backward { cut.segments - 1 - number } else { number };
            let mut y = parts[place].lock().unwrap_or_else(PoisonError::into_inner);
            worker.panel.resize(cut.height * n, 0.0);
            worker.sums.clear();
            worker.sums.resize(b * n, 0.0);
            let mut squares = 0.0;
            let first = place * cut.per_segment * cut.height;
            for (i, y) in y.chunks_mut(cut.height * b).enumerate() {
                let top = first + i * cut.height;
                let height = y.len() / b;
                let p = &mut worker.panel[..height * n];
                let (rows, looked) = (top..top + height, known.is_some());
                squares += panel::read_single((self.matrix, scale), level, rows, looked, &mut worker.scratch, p)?;
                if let Some(signs) = self.signs {
                    panel::flip(self.matrix, level, signs, top..top + height, p);
                }
                if !v.is_empty() {
                    y.fill(0.0);
                    for k in (0..n).step_by(RUN) {
                        let depth = RUN.min(n - k);
                        dispatch::multiply(level, y, &p[k..], &v[k * b..], [b, n, b], [height, depth, b], level.tall());
                    }
                }
                dispatch::cross(level, &mut worker.sums, y, p, [n, b, n], [b, height, n], level.tall());
            }
            turn.take(number, self.control, || {
                let mut total = total.lock().unwrap_or_else(PoisonError::into_inner);
                total.0.iter_mut().zip(&worker.sums).for_each(|(t, &s)| *t += f64::from(s));
                total.1 += squares;
                Ok(())
            })?;
            self.control.advance(share);
            Ok(())
        };
        pass::run(
            &Grid::new(vec![cut.segments as u64 * BLOCK], 1),
            threads,
            self.control,
            || Hired::from(&self.workers),
            |_| {},
            |hired, number, _| segment(&mut hired.worker, number).inspect_err(|_| turn.give_up()),
        )?;
        debug_assert_eq!(parts.len(), cut.segments);
        debug_assert!(rows > 0);
        drop(parts);
        let (w, squares) = total.into_inner().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = known {
            return Ok((w, known));
        }
        if self.rescaled(squares)? {
            self.control.expect(self.matrix.bytes());
            return self.products(v, y, b, backward);
        }
        Ok((w, *self.squares.get_or_init(|| squares)))
    }

    /// The Krylov space of random blocks of `b` vectors, and what the matrix makes of it.
    fn space(&self, seed: u64, b: usize) -> Result<Space> {
        let Matrix { rows, columns: n, name, .. } = *self.matrix;
        let (level, threads) = (self.level, self.threads());
        let fresh = Philox::new(seed, name, FRESH);
        let mut block = vec![0.0f64; n * b];
        dispatch::normal(level, &mut block, Philox::new(seed, name, TEST), 0, 1.0);
        let mut space = Space { v: vec![], w: vec![], y: vec![], b, squares: 0.0 };
        let depth = depth(self.matrix.small());
        // All at once: a bar that is told one sweep at a time goes back at every one.
        self.control.expect(self.matrix.bytes() * depth as u64);
        for i in 0..depth {
            orthonormalise(level, threads, &mut block, b, &space.v, fresh);
            let single: Vec<f32> = block.iter().map(|&x| x as f32).collect();
            let mut y = vec![0.0f32; rows * b];
            let (w, squares) = self.products(&single, &mut y, b, i % 2 == 1)?;
            // What was multiplied is the rounded block.
            space.v.push(single.iter().map(|&x| f64::from(x)).collect());
            space.y.push(y);
            space.squares = squares;
            let mut turned = vec![0.0; n * b];
            transpose(&w, &mut turned, b, n);
            block = if i + 1 < depth { turned.clone() } else { vec![] };
            space.w.push(turned);
        }
        self.dismiss();
        Ok(space)
    }

    /// Frees what workers hold.
    fn dismiss(&self) {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

/// A space of right vectors `v`, with `y = A v` and `w = A^T y`, in blocks of `b`.
struct Space {
    v: Vec<Vec<f64>>,
    w: Vec<Vec<f64>>,
    y: Vec<Vec<f32>>,
    b: usize,
    squares: f64,
}

impl Space {
    fn dimensions(&self) -> usize {
        self.b * self.v.len()
    }

    /// What can be told of the projection from small matrices.
    fn ritz(&self, level: Level, threads: usize) -> Ritz {
        let k = self.dimensions();
        let (g, m) = (dense::gram(level, threads, &self.y, self.b), dense::gram(level, threads, &self.w, self.b));
        let (values, vectors) = symmetric(&g, k);
        let kept = values.iter().take_while(|&&d| d > 1e-7 * values[0] && d > 0.0).count();
        let mut z = vec![0.0; k * kept];
        for i in 0..kept {
            for j in 0..k {
                z[j * kept + i] = vectors[i * k + j] / values[i].sqrt();
            }
        }
        let mut turned = vec![0.0; k * kept];
        transpose(&z, &mut turned, k, kept);
        let c = product(level, &turned, &product(level, &m, &z, k, k, kept), kept, k, kept);
        let (squares, rotations) = symmetric(&c, kept);
        let mut q = vec![0.0; kept * kept];
        transpose(&rotations, &mut q, kept, kept);
        let values = squares.iter().map(|s| s.max(0.0).sqrt()).collect();
        Ritz { values, x: product(level, &z, &q, k, kept, kept), g, m }
    }
}

/// The thin SVD of `(y x) (w x)^T`: `y left`, `s`, and `w right`.
struct Turned {
    s: Vec<f64>,
    left: Vec<f64>,
    right: Vec<f64>,
}

/// A projection on the range of `y`, by small matrices.
struct Ritz {
    /// Its singular values.
    values: Vec<f64>,
    /// `k` rows, as many columns as values: `y x` are the left vectors.
    x: Vec<f64>,
    /// `y^T y`.
    g: Vec<f64>,
    /// `w^T w`.
    m: Vec<f64>,
}

impl Ritz {
    /// For the first `r` columns `x`, which combinations the triplets are, from small matrices alone: once more, because what small directions lost is in
    /// the other columns. Nothing if squares lose too much.
    fn turned(&self, level: Level, x: &[f64], r: usize) -> Option<Turned> {
        if r == 0 {
            return None;
        }
        let k = x.len() / r;
        let of = |m: &[f64], x: &[f64]| cross(level, 1, x, r, &product(level, m, x, k, k, r), r);
        let straight = invert_triangle(&cholesky(&of(&self.g, x), r, 1e-3)?, r);
        let x = product(level, x, &straight, k, r, r);
        let (squares, vectors) = symmetric(&of(&self.m, &x), r);
        if squares[r - 1] <= 0.5 * CLEAR * CLEAR * squares[0] {
            return None;
        }
        let s: Vec<f64> = squares.iter().map(|s| s.sqrt()).collect();
        let mut turn = vec![0.0; r * r];
        transpose(&vectors, &mut turn, r, r);
        let left = product(level, &x, &turn, k, r, r);
        let mut right = left.clone();
        right.chunks_exact_mut(r).for_each(|row| row.iter_mut().zip(&s).for_each(|(x, s)| *x /= s));
        Some(Turned { s, left, right })
    }
}

/// The leading singular triplets of a matrix.
///
/// The same for any thread count, budget and SIMD level; random numbers are keyed by `seed` and the tensor's name.
///
/// # Errors
/// [`Error::NonFinite`], [`Error::Io`], [`Error::Cancelled`]; [`Error::Mismatch`] for numbers too large to have a sum of squares;
/// [`Error::Usage`] for a share outside 0 to 1 and a rank of zero.
pub fn top(matrix: &Matrix<'_>, rank: Rank, seed: u64, settings: &Settings, control: &Control) -> Result<Triplets> {
    let small = matrix.small();
    if let Rank::Energy(share) | Rank::Error(share) = rank
        && !(0.0..=1.0).contains(&share)
    {
        return Err(Error::Usage(format!("a share is between 0 and 1, not {share}")));
    }
    if let Rank::Fixed(r) = rank {
        some(r)?;
    }
    let floor = match rank {
        Rank::Noise => Some(floor(matrix, seed, settings, control)?),
        _ => None,
    };
    let sweep = Sweep::new(matrix, settings, control)?;
    let scaled = |floor: Option<f64>| floor.map(|f| sweep.scale().multiply(f));
    let mut b = match rank {
        Rank::Fixed(r) => r.min(small).div_ceil(2).next_multiple_of(STEP),
        _ => STEP,
    };
    loop {
        if 2 * b * depth(small) > small {
            let mut all = gram::decompose(&sweep)?;
            let r = choose(rank, &all.s, all.squares, scaled(floor)).unwrap_or(all.s.len());
            cut(&mut all, matrix.rows, matrix.columns, r);
            return Ok(Triplets { floor, ..sweep.restored(all)? });
        }
        let space = sweep.space(seed, b)?;
        let ritz = space.ritz(sweep.level, sweep.threads());
        let values = &ritz.values;
        let chosen = choose(rank, values, space.squares, scaled(floor));
        let enough = match (rank, chosen) {
            (Rank::Fixed(_), _) => true,
            // A block sees no more values that lie close together than it has vectors, and true updates come with such.
            (Rank::Noise, Some(r)) => r <= b,
            // Half of the space at most: the rest is what makes that half exact.
            (_, Some(r)) => 2 * r <= space.dimensions(),
            (_, None) => false,
        };
        let Some(r) = chosen.filter(|_| enough).map(|r| r.min(small)) else {
            b *= 2;
            continue;
        };
        let clear = r <= values.len() && (r == 0 || values[r - 1] > CLEAR * values[0]);
        let triplets = if clear || space.squares == 0.0 {
            space.triplets(&sweep, &ritz, r)
        } else {
            space.refined(&sweep, r, seed)?
        };
        return Ok(Triplets { floor, ..sweep.restored(triplets)? });
    }
}

/// Refuses a rank of zero, which is no matrix.
pub(super) fn some(rank: usize) -> Result<()> {
    if rank > 0 { Ok(()) } else { Err(Error::Usage("a number of singular triplets is at least 1, not 0".into())) }
}

/// Bytes of anonymous memory that [`top`] holds at most: for a number of triplets, and for a rule from what few of them take to what all do.
pub fn memory(rows: usize, columns: usize, rank: Rank, settings: &Settings) -> [u64; 2] {
    let small = rows.min(columns);
    let whole = gram::memory(rows, columns, None, settings.threads());
    let of = |r: usize, b: usize| {
        if 2 * b * depth(small) > small { whole } else { krylov_memory(rows, columns, b, r, settings) }
    };
    match rank {
        Rank::Fixed(r) => [of(r.min(small), r.min(small).div_ceil(2).next_multiple_of(STEP)); 2],
        _ => {
            let least = of(STEP, STEP);
            [least, whole.max(least)]
        }
    }
}

/// Bytes for `r` triplets from blocks of `b` vectors.
fn krylov_memory(rows: usize, columns: usize, b: usize, r: usize, settings: &Settings) -> u64 {
    let blocks = depth(rows.min(columns));
    let [m, n, b, r, k] = [rows, columns, b, r, b * blocks].map(|x| x as u64);
    let height = Cut::height(columns);
    let sweep = |b: u64| {
        let held = Worker::bytes(columns, height, b as usize);
        let threads = (settings.threads() as u64).min((settings.memory_budget / held).max(1));
        threads * (held + SCRATCH) + 8 * n * b
    };
    let space = k * (16 * n + 4 * m);
    let finish = 8 * r * (3 * m.max(n) + m.min(n));
    let krylov = space + finish.max(sweep(b) + 28 * n * b);
    // One more sweep, should small values be wanted: the left vectors made orthonormal, then with what the matrix makes of them.
    let refined = space + 4 * m * k + (8 * m * k + 16 * m * b).max(sweep(k) + 8 * n * k).max(8 * n * k + finish);
    krylov.max(refined)
}

/// How many values a rule takes; nothing if there are not enough of them to say.
pub(super) fn choose(rank: Rank, values: &[f64], squares: f64, floor: Option<f64>) -> Option<usize> {
    let holding = |share: f64| {
        let mut sum = 0.0;
        if share * squares <= 0.0 {
            return Some(0);
        }
        values
            .iter()
            .position(|s| {
                sum += s * s;
                sum >= share * squares
            })
            .map(|i| i + 1)
    };
    match rank {
        Rank::Fixed(r) => Some(r),
        Rank::Energy(share) => holding(share),
        Rank::Error(share) => holding(1.0 - share * share),
        Rank::Noise => Some(values.iter().filter(|&&s| s > floor.unwrap_or(0.0)).count()),
    }
}

/// Keeps the first `r`.
pub(super) fn cut(all: &mut Triplets, rows: usize, columns: usize, r: usize) {
    let r = r.min(all.rank);
    let keep = |values: &[f32], rows: usize| {
        let width = values.len() / rows;
        values.chunks_exact(width.max(1)).flat_map(|row| row[..r].iter().copied()).collect()
    };
    all.u = keep(&all.u, rows);
    all.v = keep(&all.v, columns);
    all.s.truncate(r);
    all.rank = r;
    all.residual = residual(all.squares, &all.s);
}

/// What is left of a norm.
pub(super) fn residual(squares: f64, s: &[f64]) -> f64 {
    (squares - s.iter().map(|s| s * s).sum::<f64>()).max(0.0).sqrt()
}

/// The largest singular value of the matrix with random signs: what a matrix of entries of these sizes has without any structure.
///
/// # Errors
/// As [`top`].
pub fn floor(matrix: &Matrix<'_>, seed: u64, settings: &Settings, control: &Control) -> Result<f64> {
    let mut sweep = Sweep::new(matrix, settings, control)?;
    sweep.signs = Some(Philox::new(seed, matrix.name, SIGNS));
    if 2 * STEP * depth(matrix.small()) > matrix.small() {
        return Ok(gram::spectrum_of(&sweep)?.first().copied().unwrap_or(0.0));
    }
    let space = sweep.space(seed, STEP)?;
    let ritz = space.ritz(sweep.level, sweep.threads());
    Ok(sweep.restored_values(ritz.values)?.first().copied().unwrap_or(0.0))
}

impl Sweep<'_> {
    /// The signs, for whoever reads the matrix another way.
    pub(super) fn signs(&self) -> Option<Philox> {
        self.signs
    }
}

impl Space {
    /// The first `r` triplets from the combinations of [`Space::ritz`].
    fn triplets(&self, sweep: &Sweep<'_>, ritz: &Ritz, r: usize) -> Triplets {
        let (level, threads, b) = (sweep.level, sweep.threads(), self.b);
        let kept = ritz.values.len();
        let r = r.min(kept);
        let x: Vec<f64> = ritz.x.chunks_exact(kept.max(1)).flat_map(|row| row[..r].iter().copied()).collect();
        if let Some(Turned { s, mut left, right }) = ritz.turned(level, &x, r) {
            let mut v: Vec<f64> = combine(level, threads, &self.w, b, &right, r);
            let signs = signs(&v, r);
            for rows in [&mut left, &mut v] {
                rows.chunks_exact_mut(r).for_each(|row| row.iter_mut().zip(&signs).for_each(|(x, sign)| *x *= sign));
            }
            let (u, v) = (combine(level, threads, &self.y, b, &left, r), v.into_iter().map(|x| x as f32).collect());
            let residual = residual(self.squares, &s);
            return Triplets { rank: r, u, s, v, squares: self.squares, residual, floor: None };
        }
        // `v` is A^T u: the singular values are in it.
        let (u, v) = (combine(level, threads, &self.y, b, &x, r), combine(level, threads, &self.w, b, &x, r));
        finish(level, threads, u, v, r, self.squares)
    }

    /// The first `r` triplets, with one more sweep: `Y` is made orthonormal, and the projection is taken of the matrix itself.
    fn refined(&self, sweep: &Sweep<'_>, r: usize, seed: u64) -> Result<Triplets> {
        let (level, threads, b) = (sweep.level, sweep.threads(), self.b);
        let Matrix { rows, columns, name, .. } = *sweep.matrix;
        let fresh = Philox::new(seed, name, FRESH + 1);
        let mut q: Vec<Vec<f64>> = Vec::with_capacity(self.y.len());
        for y in &self.y {
            let mut block: Vec<f64> = y.iter().map(|&x| f64::from(x)).collect();
            orthonormalise(level, threads, &mut block, b, &q, fresh);
            q.push(block);
        }
        let k = self.dimensions();
        let mut single = vec![0.0f32; rows * k];
        for (i, block) in q.iter().enumerate() {
            for (into, from) in single.chunks_exact_mut(k).zip(block.chunks_exact(b)) {
                into[i * b..(i + 1) * b].iter_mut().zip(from).for_each(|(o, &x)| *o = x as f32);
            }
        }
        drop(q);
        sweep.control.expect(sweep.matrix.bytes());
        let (w, squares) = sweep.products(&[], &mut single, k, false)?;
        sweep.dismiss();
        let mut turned = vec![0.0; columns * k];
        transpose(&w, &mut turned, k, columns);
        let (_, vectors) = symmetric(&cross(level, threads, &turned, k, &turned, k), k);
        let r = r.min(k);
        let mut x = vec![0.0; k * r];
        transpose(&vectors[..k * r], &mut x, r, k);
        let (mut u, mut v) = (vec![0.0; rows * r], vec![0.0; columns * r]);
        add_product(level, threads, &mut u, &single, k, &x, r);
        add_product(level, threads, &mut v, &turned, k, &x, r);
        Ok(finish(level, threads, u, v, r, squares))
    }
}
