//! Exact widening and single-rounding narrowing of the float formats.
//!
//! All conversions work on bit patterns with integer operations or IEEE operations that are exact, so that they are
//! the same on every processor and at every SIMD level; subnormals are kept, and every NaN that arithmetic makes
//! becomes the one canonical quiet NaN of its format. The bodies are branchless because the compiler turns them into vector code.

/// The type in which elements are combined: `f32`, or `f64` when some operand is `F64`.
pub trait Work:
    Copy
    + Send
    + Sync
    + Default
    + PartialEq
    + PartialOrd
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::Div<Output = Self>
    + std::ops::Neg<Output = Self>
    + 'static
{
    /// Zero.
    const ZERO: Self;
    /// Rounds (or keeps) an f64.
    fn from_f64(x: f64) -> Self;
    /// Widens exactly.
    fn to_f64(self) -> f64;
    /// Numbers as f64: themselves, or widened into what is lent.
    fn doubles<'a>(x: &'a [Self], lent: &'a mut Vec<f64>) -> &'a [f64];
    /// |x|.
    fn abs(self) -> Self;
    /// Neither NaN nor infinite.
    fn is_finite(self) -> bool;
    /// An element, exactly.
    fn widen<E: Element>(element: E) -> Self;
    /// Rounded once into a format, to nearest even; NaN becomes canonical.
    fn narrow<E: Element>(self) -> E;
    /// [`Work::narrow`], quicker, for numbers whose magnitude is below [`Work::limit`].
    fn narrow_below<E: Element>(self) -> E;
    /// The magnitude's bits: they sort as magnitudes do, infinity and NaN last.
    type Magnitude: Copy
        + Ord
        + Default
        + Send
        + Sync
        + Into<u64>
        + TryFrom<u64>
        + std::ops::BitOr<Output = Self::Magnitude>
        + std::ops::BitXor<Output = Self::Magnitude>;
    /// The bits, the sign's among them.
    fn bits(self) -> Self::Magnitude;
    /// |x| by its bits.
    fn magnitude(self) -> Self::Magnitude;
    /// The smallest magnitude that a format's largest number does not hold.
    fn limit<E: Element>() -> Self::Magnitude;
    /// The value of a magnitude.
    fn from_magnitude(magnitude: Self::Magnitude) -> Self;
}

impl Work for f32 {
    const ZERO: Self = 0.0;
    #[inline(always)]
    fn from_f64(x: f64) -> Self {
        x as f32
    }
    #[inline(always)]
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
    fn doubles<'a>(x: &'a [Self], lent: &'a mut Vec<f64>) -> &'a [f64] {
        lent.clear();
        lent.extend(x.iter().map(|&x| f64::from(x)));
        lent
    }
    #[inline(always)]
    fn abs(self) -> Self {
        f32::abs(self)
    }
    #[inline(always)]
    fn is_finite(self) -> bool {
        f32::is_finite(self)
    }
    #[inline(always)]
    fn widen<E: Element>(element: E) -> Self {
        element.widen32()
    }
    #[inline(always)]
    fn narrow<E: Element>(self) -> E {
        E::narrow32(self)
    }
    #[inline(always)]
    fn narrow_below<E: Element>(self) -> E {
        E::narrow32_below(self)
    }
    type Magnitude = u32;
    #[inline(always)]
    fn bits(self) -> u32 {
        self.to_bits()
    }
    #[inline(always)]
    fn magnitude(self) -> u32 {
        self.to_bits() & 0x7FFF_FFFF
    }
    #[inline(always)]
    fn limit<E: Element>() -> u32 {
        E::LIMIT32
    }
    #[inline(always)]
    fn from_magnitude(magnitude: u32) -> Self {
        Self::from_bits(magnitude)
    }
}

impl Work for f64 {
    const ZERO: Self = 0.0;
    #[inline(always)]
    fn from_f64(x: f64) -> Self {
        x
    }
    #[inline(always)]
    fn to_f64(self) -> f64 {
        self
    }
    fn doubles<'a>(x: &'a [Self], _lent: &'a mut Vec<f64>) -> &'a [f64] {
        x
    }
    #[inline(always)]
    fn abs(self) -> Self {
        f64::abs(self)
    }
    #[inline(always)]
    fn is_finite(self) -> bool {
        f64::is_finite(self)
    }
    #[inline(always)]
    fn widen<E: Element>(element: E) -> Self {
        element.widen64()
    }
    #[inline(always)]
    fn narrow<E: Element>(self) -> E {
        E::narrow64(self)
    }
    #[inline(always)]
    fn narrow_below<E: Element>(self) -> E {
        E::narrow64_below(self)
    }
    type Magnitude = u64;
    #[inline(always)]
    fn bits(self) -> u64 {
        self.to_bits()
    }
    #[inline(always)]
    fn magnitude(self) -> u64 {
        self.to_bits() & 0x7FFF_FFFF_FFFF_FFFF
    }
    #[inline(always)]
    fn limit<E: Element>() -> u64 {
        E::LIMIT64
    }
    #[inline(always)]
    fn from_magnitude(magnitude: u64) -> Self {
        Self::from_bits(magnitude)
    }
}

/// One element of a float format, as it lies in a file.
pub trait Element: Copy + Send + Sync + PartialEq + 'static {
    /// Bytes per element.
    const SIZE: usize;
    /// From little-endian bytes.
    fn load(bytes: &[u8]) -> Self;
    /// To little-endian bytes, into a slice of `SIZE`.
    fn store(self, bytes: &mut [u8]);
    /// Exact for 16- and 32-bit formats; rounds an f64 (never used so: f64 tensors are combined in f64).
    fn widen32(self) -> f32;
    /// Exact.
    fn widen64(self) -> f64;
    /// Rounds once, to nearest even.
    fn narrow32(x: f32) -> Self;
    /// Rounds once, to nearest even.
    fn narrow64(x: f64) -> Self;
    /// Bits of the smallest f32 that is too large for the format: halfway past its largest number.
    const LIMIT32: u32;
    /// Bits of the smallest f64 that is too large for the format.
    const LIMIT64: u64;
    /// [`Element::narrow32`] of a number below the limit.
    #[inline(always)]
    fn narrow32_below(x: f32) -> Self {
        Self::narrow32(x)
    }
    /// [`Element::narrow64`] of a number below the limit.
    #[inline(always)]
    fn narrow64_below(x: f64) -> Self {
        Self::narrow64(x)
    }
    /// Neither NaN nor infinite.
    fn finite(self) -> bool;
    /// The same bits: distinguishes -0 from +0, and NaNs by payload.
    fn same_bits(self, other: Self) -> bool;
}

/// f64 to f32 with round-to-odd: inexact results get an odd last bit, so that a second rounding to at least two bits
/// less gives what a single rounding would have (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
#[inline(always)]
fn to_f32_odd(x: f64) -> f32 {
    let nearest = x as f32;
    let back = f64::from(nearest);
    let bits = nearest.to_bits();
    // Step to the neighbour on the other side of x when the nearest value is even: of the two neighbours exactly one is odd.
    let inexact = back != x && !x.is_nan();
    let even = bits & 1 == 0;
    let away = back.abs() > x.abs();
    let odd = if away { bits.wrapping_sub(1) } else { bits.wrapping_add(1) };
    f32::from_bits(if inexact && even { odd } else { bits })
}

/// bfloat16, by its bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub struct Bf16(pub u16);

/// IEEE binary16, by its bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub struct F16(pub u16);

impl Element for Bf16 {
    const SIZE: usize = 2;
    const LIMIT32: u32 = 0x7F7F_8000;
    const LIMIT64: u64 = 0x47EF_F000_0000_0000;
    #[inline(always)]
    fn narrow32_below(x: f32) -> Self {
        let bits = x.to_bits();
        Self((bits.wrapping_add(0x7FFF + ((bits >> 16) & 1)) >> 16) as u16)
    }
    #[inline(always)]
    fn load(bytes: &[u8]) -> Self {
        Self(u16::from_le_bytes([bytes[0], bytes[1]]))
    }
    #[inline(always)]
    fn store(self, bytes: &mut [u8]) {
        bytes.copy_from_slice(&self.0.to_le_bytes());
    }
    #[inline(always)]
    fn widen32(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }
    #[inline(always)]
    fn widen64(self) -> f64 {
        f64::from(self.widen32())
    }
    #[inline(always)]
    fn narrow32(x: f32) -> Self {
        let bits = x.to_bits();
        // Nearest even by adding half a unit less one, plus the bit that decides ties; infinities stay, overflow becomes infinity.
        let rounded = bits.wrapping_add(0x7FFF + ((bits >> 16) & 1)) >> 16;
        Self(if bits & 0x7FFF_FFFF > 0x7F80_0000 { 0x7FC0 } else { rounded as u16 })
    }
    #[inline(always)]
    fn narrow64(x: f64) -> Self {
        Self::narrow32(to_f32_odd(x))
    }
    #[inline(always)]
    fn finite(self) -> bool {
        self.0 & 0x7F80 != 0x7F80
    }
    #[inline(always)]
    fn same_bits(self, other: Self) -> bool {
        self.0 == other.0
    }
}

impl Element for F16 {
    const SIZE: usize = 2;
    const LIMIT32: u32 = 0x477F_F000;
    const LIMIT64: u64 = 0x40EF_FE00_0000_0000;
    #[inline(always)]
    fn load(bytes: &[u8]) -> Self {
        Self(u16::from_le_bytes([bytes[0], bytes[1]]))
    }
    #[inline(always)]
    fn store(self, bytes: &mut [u8]) {
        bytes.copy_from_slice(&self.0.to_le_bytes());
    }
    #[inline(always)]
    fn widen32(self) -> f32 {
        let h = u32::from(self.0);
        let sign = (h & 0x8000) << 16;
        let magnitude = (h & 0x7FFF) << 13;
        // As f32 bits the magnitude is 2^112 too small, subnormals included; the product is exact.
        let finite = f32::from_bits(magnitude) * f32::from_bits(0x7780_0000);
        let special = 0x7F80_0000 | (magnitude & 0x007F_FFFF);
        let bits = if h & 0x7C00 == 0x7C00 { special } else { finite.to_bits() };
        f32::from_bits(bits | sign)
    }
    #[inline(always)]
    fn widen64(self) -> f64 {
        f64::from(self.widen32())
    }
    #[inline(always)]
    fn narrow32(x: f32) -> Self {
        let bits = x.to_bits();
        let sign = ((bits >> 16) & 0x8000) as u16;
        let magnitude = bits & 0x7FFF_FFFF;
        // Normal results: round the 13 low bits to nearest even and move the exponent by 112.
        let normal = magnitude.wrapping_add(0x0FFF + ((magnitude >> 13) & 1)).wrapping_sub(112 << 23) >> 13;
        // Subnormal results: adding 0.5 puts the last place of the sum at 2^-24, the step of binary16's subnormals.
        let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0x3F00_0000);
        let finite = if magnitude < 0x3880_0000 { subnormal } else { normal };
        let half = if magnitude >= 0x4780_0000 { 0x7C00 } else { finite as u16 };
        Self(if magnitude > 0x7F80_0000 { 0x7E00 } else { half | sign })
    }
    #[inline(always)]
    fn narrow64(x: f64) -> Self {
        Self::narrow32(to_f32_odd(x))
    }
    #[inline(always)]
    fn finite(self) -> bool {
        self.0 & 0x7C00 != 0x7C00
    }
    #[inline(always)]
    fn same_bits(self, other: Self) -> bool {
        self.0 == other.0
    }
}

impl Element for f32 {
    const SIZE: usize = 4;
    const LIMIT32: u32 = 0x7F80_0000;
    const LIMIT64: u64 = 0x47EF_FFFF_F000_0000;
    #[inline(always)]
    fn narrow32_below(x: f32) -> Self {
        x
    }
    #[inline(always)]
    fn load(bytes: &[u8]) -> Self {
        // Not byte by byte: compilers see one load in this.
        Self::from_le_bytes(*bytes.first_chunk().unwrap_or(&[0; 4]))
    }
    #[inline(always)]
    fn store(self, bytes: &mut [u8]) {
        bytes.copy_from_slice(&self.to_le_bytes());
    }
    #[inline(always)]
    fn widen32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn widen64(self) -> f64 {
        f64::from(self)
    }
    #[inline(always)]
    fn narrow32(x: f32) -> Self {
        if x.is_nan() { Self::from_bits(0x7FC0_0000) } else { x }
    }
    #[inline(always)]
    fn narrow64(x: f64) -> Self {
        Self::narrow32(x as Self)
    }
    #[inline(always)]
    fn finite(self) -> bool {
        self.to_bits() & 0x7F80_0000 != 0x7F80_0000
    }
    #[inline(always)]
    fn same_bits(self, other: Self) -> bool {
        self.to_bits() == other.to_bits()
    }
}

impl Element for f64 {
    const SIZE: usize = 8;
    const LIMIT32: u32 = 0x7F80_0000;
    const LIMIT64: u64 = 0x7FF0_0000_0000_0000;
    #[inline(always)]
    fn narrow64_below(x: f64) -> Self {
        x
    }
    #[inline(always)]
    fn load(bytes: &[u8]) -> Self {
        Self::from_le_bytes(*bytes.first_chunk().unwrap_or(&[0; 8]))
    }
    #[inline(always)]
    fn store(self, bytes: &mut [u8]) {
        bytes.copy_from_slice(&self.to_le_bytes());
    }
    #[inline(always)]
    fn widen32(self) -> f32 {
        self as f32
    }
    #[inline(always)]
    fn widen64(self) -> f64 {
        self
    }
    #[inline(always)]
    fn narrow32(x: f32) -> Self {
        Self::narrow64(f64::from(x))
    }
    #[inline(always)]
    fn narrow64(x: f64) -> Self {
        if x.is_nan() { Self::from_bits(0x7FF8_0000_0000_0000) } else { x }
    }
    #[inline(always)]
    fn finite(self) -> bool {
        self.is_finite()
    }
    #[inline(always)]
    fn same_bits(self, other: Self) -> bool {
        self.to_bits() == other.to_bits()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_16_bit_value_survives_widening_and_narrowing() {
        for bits in 0..=u16::MAX {
            let (b, h) = (Bf16(bits), F16(bits));
            let nan_b = b.widen32().is_nan();
            let nan_h = h.widen32().is_nan();
            assert_eq!(Bf16::narrow32(b.widen32()).0, if nan_b { 0x7FC0 } else { bits });
            assert_eq!(Bf16::narrow64(b.widen64()).0, if nan_b { 0x7FC0 } else { bits });
            assert_eq!(F16::narrow32(h.widen32()).0, if nan_h { 0x7E00 } else { bits });
            assert_eq!(F16::narrow64(h.widen64()).0, if nan_h { 0x7E00 } else { bits });
        }
    }

    fn limits_are_the_first_that_overflow<E: Element>() {
        for (limit, finite) in
            [(f64::from(f32::from_bits(E::LIMIT32)), false), (f64::from(f32::from_bits(E::LIMIT32 - 1)), true)]
        {
            assert_eq!(E::narrow32(limit as f32).finite(), finite);
        }
        assert!(!E::narrow64(f64::from_bits(E::LIMIT64)).finite());
        assert!(E::narrow64(f64::from_bits(E::LIMIT64 - 1)).finite());
    }

    #[test]
    fn limits() {
        limits_are_the_first_that_overflow::<Bf16>();
        limits_are_the_first_that_overflow::<F16>();
        limits_are_the_first_that_overflow::<f32>();
        limits_are_the_first_that_overflow::<f64>();
    }

    /// The nearest 16-bit value by search, ties to even: slow and obviously right.
    fn nearest<E: Element>(x: f64, make: fn(u16) -> E, inf: u16) -> u16 {
        let magnitude = x.abs();
        let value = |m: u16| make(m).widen64();
        let mut low = 0u16;
        let mut high = inf;
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if value(middle) <= magnitude { low = middle } else { high = middle }
        }
        // Past the largest finite value the next step decides, as if the exponent went on.
        let above = if high == inf { 2.0 * value(inf - 1) - value(inf - 2) } else { value(high) };
        let (down, up) = (magnitude - value(low), above - magnitude);
        let pick = if down < up || (down == up && low.is_multiple_of(2)) { low } else { high };
        pick | if x.is_sign_negative() { 0x8000 } else { 0 }
    }

    proptest! {
        #[test]
        fn narrowing_takes_the_nearest_even(x in any::<f64>(), scale in -160i32..140) {
            let x = x.to_bits() & 0x800F_FFFF_FFFF_FFFF | (((1023 + scale) as u64) << 52);
            let x = f64::from_bits(x);
            prop_assert_eq!(Bf16::narrow64(x).0, nearest(x, Bf16, 0x7F80));
            prop_assert_eq!(F16::narrow64(x).0, nearest(x, F16, 0x7C00));
            let single = x as f32;
            prop_assert_eq!(Bf16::narrow32(single).0, nearest(f64::from(single), Bf16, 0x7F80));
            prop_assert_eq!(F16::narrow32(single).0, nearest(f64::from(single), F16, 0x7C00));
            if single.magnitude() < Bf16::LIMIT32 {
                prop_assert_eq!(Bf16::narrow32_below(single).0, Bf16::narrow32(single).0);
            }
        }

        #[test]
        fn ties_go_to_even(bits in 0u16..0x7F7F, low in 0u64..4) {
            let a = Bf16(bits).widen64();
            let b = Bf16(bits + 1).widen64();
            let middle = (a + b) / 2.0;
            prop_assert_eq!(Bf16::narrow64(middle).0, bits + (bits & 1));
            // A hair above the tie, far below f32's last place: double rounding would lose it.
            let above = f64::from_bits(middle.to_bits() + 1 + low);
            prop_assert_eq!(Bf16::narrow64(above).0, bits + 1);
        }
    }
}
