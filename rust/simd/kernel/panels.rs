//! Products of matrices in panels, whose rows lie side by side.

/// Rows of a panel of [`multiply_panels`]: those of its tallest register tile.
pub const PANEL: usize = 12;

/// [`multiply`](super::multiply) of an `a` in panels of [`PANEL`] rows, of which the stride is that of `a`, and in which columns lie one behind the other: what goes
/// through a tile comes from memory in order, and rows of any length share no place in the cache. The last panel is as long as the others.
#[inline(always)]
pub fn multiply_panels(into: &mut [f64], a: &[f64], b: &[f64], strides: [usize; 3], size: [usize; 3], tall: usize) {
    match tall {
        12.. => panels::<12>(into, a, b, strides, size),
        6.. => panels::<4>(into, a, b, strides, size),
        _ => panels::<2>(into, a, b, strides, size),
    }
}

/// Columns of a register tile of [`multiply_panels`].
const WIDTH: usize = 8;

/// [`multiply_panels`] in tiles of `R` rows, and smaller ones at the edges.
#[inline(always)]
fn panels<const R: usize>(
    into: &mut [f64],
    a: &[f64],
    b: &[f64],
    [wide, apart, under]: [usize; 3],
    [rows, depth, columns]: [usize; 3],
) {
    if depth == 0 {
        return;
    }
    let whole = columns - columns % WIDTH;
    for j in (0..whole).step_by(WIDTH) {
        let b = &b[j..];
        let mut i = 0;
        while i < rows {
            let (into, a) = (&mut into[i * wide + j..], &a[i / PANEL * apart + i % PANEL..]);
            i += match (rows - i).min(PANEL - i % PANEL) {
                left if left >= R => panel_tile::<R>(into, a, b, [wide, under], depth),
                4.. => panel_tile::<4>(into, a, b, [wide, under], depth),
                2.. => panel_tile::<2>(into, a, b, [wide, under], depth),
                _ => panel_tile::<1>(into, a, b, [wide, under], depth),
            };
        }
    }
    if whole < columns {
        let width = columns - whole;
        for i in 0..rows {
            let mut sums = [0.0; WIDTH];
            let sums = &mut sums[..width];
            let a = &a[i / PANEL * apart + i % PANEL..];
            for k in 0..depth {
                for (s, &b) in sums.iter_mut().zip(&b[k * under + whole..][..width]) {
                    *s += a[k * PANEL] * b;
                }
            }
            for (o, &s) in into[i * wide + whole..][..width].iter_mut().zip(&*sums) {
                *o += s;
            }
        }
    }
}

/// As the tiles of `multiply`. Compilers are not to know that the rows of a panel are neighbours: they would take those for lanes, and then keep sums in memory.
#[inline(always)]
fn panel_tile<const R: usize>(
    into: &mut [f64],
    a: &[f64],
    b: &[f64],
    [wide, under]: [usize; 2],
    depth: usize,
) -> usize {
    let next = std::hint::black_box(1);
    let rows: [&[f64]; R] = std::array::from_fn(|r| &a[r * next..][..(depth - 1) * PANEL + 1]);
    let b = &b[..(depth - 1) * under + WIDTH];
    let mut sums = [[0.0; WIDTH]; R];
    for k in 0..depth {
        let mut lanes = [0.0; WIDTH];
        lanes.copy_from_slice(&b[k * under..][..WIDTH]);
        for r in 0..R {
            let a = rows[r][k * PANEL];
            for c in 0..WIDTH {
                sums[r][c] += a * lanes[c];
            }
        }
    }
    for r in 0..R {
        let into = &mut into[r * wide..][..WIDTH];
        for c in 0..WIDTH {
            into[c] += sums[r][c];
        }
    }
    R
}
