//! What moved, of a MICRO of differences: which elements, and their values one behind the other.

use crate::bf16::{Element, Work};
use crate::simd::Level;
use crate::simd::dispatch::{self, Half, MICRO};

/// Room behind the values for what is written before anybody counts.
const ROOM: usize = MICRO + 64;

/// The elements of a MICRO that are not zero.
#[derive(Debug, Default)]
pub struct Moved<W> {
    bits: Vec<u8>,
    values: Vec<W>,
    count: usize,
    /// What both donors have there.
    donors: [Vec<Half>; 2],
}

impl<W: Work> Moved<W> {
    /// Takes in at most MICRO differences.
    pub fn take(&mut self, level: Level, u: &[W]) {
        self.fit(u.len());
        dispatch::flag(level, &mut self.bits, u);
        self.count = dispatch::pick(level, &mut self.values, &self.bits, u);
    }

    /// [`Self::take`] for `u = p - n` of one 16-bit format, of which only what differs is looked at closely: whether `n + u` is `p` bit for
    /// bit. `None` if it cannot be told from that: where zeros differ by their signs, or an element is not finite.
    pub fn compare<E: Element>(&mut self, level: Level, p: &[u8], n: &[u8]) -> Option<bool> {
        let (halves, []) = p.as_chunks() else { return None };
        let mut infinity = Half::default();
        if E::SIZE != infinity.len() {
            return None;
        }
        E::narrow32(f32::INFINITY).store(&mut infinity);
        self.fit(halves.len());
        let [into_p, into_n] = &mut self.donors;
        into_p.resize(ROOM, [0; 2]);
        into_n.resize(ROOM, [0; 2]);
        let (count, largest) = dispatch::differing(level, &mut self.bits, [into_p, into_n], [halves, n.as_chunks().0]);
        if largest >= u16::from_le_bytes(infinity) {
            return None;
        }
        self.count = count;
        let (values, [p, n]) =
            (&mut self.values[..self.count], self.donors.each_ref().map(|d| d[..self.count].as_flattened()));
        dispatch::difference::<E, W>(level, values, p, n, W::from_f64(1.0), true);
        // What differs and has not moved, a zero of the other sign, does not lead back.
        let leads_back = dispatch::rebuilds::<E, W>(level, p, n, values);
        (leads_back || !values.contains(&W::ZERO)).then_some(leads_back)
    }

    fn fit(&mut self, elements: usize) {
        self.bits.resize(elements.div_ceil(64) * 8, 0);
        self.values.resize(ROOM, W::ZERO);
    }

    /// One bit for each element, in whole 64-bit words.
    pub fn bits(&self) -> &[u8] {
        &self.bits
    }

    /// What is not zero.
    pub fn values(&self) -> &[W] {
        &self.values[..self.count]
    }

    /// The sum of squares: of the values one behind the other.
    pub fn squares(&self, level: Level) -> f64 {
        if self.count == 0 { 0.0 } else { dispatch::dot(level, self.values(), self.values()) }
    }

    /// Which element the value of a number is.
    pub fn position(&self, value: usize) -> usize {
        let mut before = value as u32;
        for (i, bytes) in self.bits.as_chunks().0.iter().enumerate() {
            let mut word = u64::from_le_bytes(*bytes);
            if before >= word.count_ones() {
                before -= word.count_ones();
                continue;
            }
            for _ in 0..before {
                word &= word - 1;
            }
            return i * 64 + word.trailing_zeros() as usize;
        }
        MICRO
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bf16::Bf16;
    use proptest::prelude::*;

    fn check(level: Level, pairs: &[(u16, u16)]) {
        let bytes = |of: fn(&(u16, u16)) -> u16| pairs.iter().flat_map(|x| of(x).to_le_bytes()).collect::<Vec<_>>();
        let (p, n) = (bytes(|x| x.0), bytes(|x| x.1));
        let mut u = vec![0f32; pairs.len()];
        dispatch::difference::<Bf16, f32>(level, &mut u, &p, &n, 1.0, true);
        let (mut taken, mut compared) = (Moved::<f32>::default(), Moved::<f32>::default());
        taken.take(level, &u);
        let positions: Vec<usize> = (0..taken.values().len()).map(|i| taken.position(i)).collect();
        assert_eq!(positions, (0..u.len()).filter(|&i| u[i] != 0.0).collect::<Vec<_>>());
        let strange = |&(p, n): &(u16, u16)| {
            let finite = |x: u16| x & 0x7F80 != 0x7F80;
            !finite(n) || p != n && p & n & 0x7FFF == 0 && (p | n) & 0x7FFF == 0
        };
        let found = compared.compare::<Bf16>(level, &p, &n);
        assert_eq!(found.is_none(), pairs.iter().any(strange), "{}", level.name());
        if let Some(rebuilds) = found {
            assert_eq!(rebuilds, dispatch::rebuilds::<Bf16, f32>(level, &p, &n, &u));
            assert_eq!(compared.bits(), taken.bits());
            let bits = |moved: &Moved<f32>| moved.values().iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&compared), bits(&taken));
        }
    }

    proptest! {
        #[test]
        fn what_differs_is_is_what_moved(
            n in prop::collection::vec(any::<u16>(), 0..600),
            p in prop::collection::vec(prop_oneof![4 => Just(None), 1 => any::<u16>().prop_map(Some)], 600),
            tame in any::<bool>(),
        ) {
            let tame = |x: u16| if tame && x & 0x7F80 == 0x7F80 { x ^ 0x0080 } else { x };
            let pairs: Vec<_> = n.iter().zip(&p).map(|(&n, p)| (tame(p.unwrap_or(n)), tame(n))).collect();
            for level in Level::available() {
                check(level, &pairs);
            }
        }
    }

    #[test]
    fn zeros_of_two_signs_are_left_to_the_differences() {
        for level in Level::available() {
            check(level, &[(0x8000, 0), (0x3F80, 0x3F81), (0, 0)]);
            check(level, &[(0x3F80, 0x3F81); MICRO]);
        }
    }
}
