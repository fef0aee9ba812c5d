//! Matrices of unusual size: a power of two, by which elements are multiplied as they are read and singular values divided in the end.
//!
//! Products of a matrix with its transpose have the square of its size, which f32 has no room for from 1e-19 and 1e19 on, and f64 none from
//! 1e-154 and 1e154. Multiplying by a power of two rounds nothing that matters, and which one depends on the matrix alone.

use crate::bf16::Work;

/// Norms between `2^-USUAL` and `2^USUAL` are left as they are.
const USUAL: i32 = 40;

/// The exponent of what elements are multiplied by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Scale(i32);

/// `2^e`, of a normal number.
fn power(e: i32) -> f64 {
    f64::from_bits(((e + 1023) as u64) << 52)
}

/// `x 2^e`, in two steps, because one of 1074 has no factor.
fn times(x: f64, e: i32) -> f64 {
    x * power(e / 2) * power(e - e / 2)
}

impl Scale {
    /// Whether a matrix with this sum of squares needs none.
    pub(super) fn is_usual(squares: f64) -> bool {
        (power(-2 * USUAL)..=power(2 * USUAL)).contains(&squares)
    }

    /// What brings a magnitude into 1 to 2.
    pub(super) fn of(largest: f64) -> Self {
        let exponent = |x: f64| (x.to_bits() >> 52 & 0x7FF) as i32 - 1023;
        match largest {
            0.0 => Self(0),
            x if x < f64::MIN_POSITIVE => Self(64 - exponent(times(x, 64))),
            x => Self(-exponent(x)),
        }
    }

    /// Multiplies what was read.
    pub(super) fn apply<W: Work>(self, values: &mut [W]) {
        if self.0 != 0 {
            values.iter_mut().for_each(|x| *x = W::from_f64(times(x.to_f64(), self.0)));
        }
    }

    /// A singular value of the matrix as one of the multiplied.
    pub(super) fn multiply(self, s: f64) -> f64 {
        times(s, self.0)
    }

    /// A singular value of the multiplied matrix as one of the matrix.
    pub(super) fn divide(self, s: f64) -> f64 {
        times(s, -self.0)
    }

    /// The same of a sum of squares.
    pub(super) fn divide_square(self, squares: f64) -> f64 {
        self.divide(self.divide(squares))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_magnitude_comes_to_between_1_and_2() {
        for x in [f64::from_bits(1), f64::MIN_POSITIVE, 1e-310, 1e-45, 0.75, 1.0, 3e38, 1e160, f64::MAX] {
            let scale = Scale::of(x);
            assert!((1.0..2.0).contains(&scale.multiply(x)), "{x}");
            assert_eq!(scale.divide(scale.multiply(x)), x);
        }
        let mut values = [f32::from_bits(1), -0.0, f32::from_bits(3)];
        Scale::of(f64::from(values[2])).apply(&mut values);
        assert_eq!(values, [0.5, -0.0, 1.5]);
        assert_eq!(Scale::of(0.0), Scale::default());
        assert!(Scale::is_usual(1.0) && !Scale::is_usual(0.0) && !Scale::is_usual(f64::NAN) && !Scale::is_usual(1e40));
    }
}
