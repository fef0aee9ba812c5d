//! Stamps each body of [`super::kernel`] for every instruction set and calls the one of a [`Level`].

use super::kernel;
pub use super::kernel::{Extent, MICRO, Rounding};
use super::level::{Level, Set};
use crate::bf16::{Element, Work};
use crate::philox::Philox;

macro_rules! stamp {
    ($(#[$doc:meta])* $name:ident [$($p:ident : $b:path),*] ($($a:ident : $t:ty),*) $(-> $r:ty)?) => {
        $(#[$doc])*
        #[allow(unsafe_code)]
        #[inline]
        pub fn $name<$($p: $b),*>(level: Level, $($a: $t),*) $(-> $r)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,bmi1,bmi2,lzcnt,popcnt")]
                fn avx2<$($p: $b),*>($($a: $t),*) $(-> $r)? {
                    kernel::$name::<$($p),*>($($a),*)
                }
                #[target_feature(enable = "avx2,bmi1,bmi2,lzcnt,popcnt,avx512f,avx512bw,avx512cd,avx512dq,avx512vl")]
                fn avx512<$($p: $b),*>($($a: $t),*) $(-> $r)? {
                    kernel::$name::<$($p),*>($($a),*)
                }
                match level.set() {
                    // SAFETY: a `Level` of this set exists only after every feature named above was detected.
                    Set::Avx512 => return unsafe { avx512::<$($p),*>($($a),*) },
                    // SAFETY: as above.
                    Set::Avx2 => return unsafe { avx2::<$($p),*>($($a),*) },
                    Set::Portable => {}
                }
            }
            let _ = level;
            kernel::$name::<$($p),*>($($a),*)
        }
    };
}

stamp!(
    /// [`kernel::widen`] at a level.
    widen [E: Element, W: Work] (into: &mut [W], from: &[u8])
);
stamp!(
    /// [`kernel::scaled`] at a level.
    scaled [E: Element, W: Work] (acc: &mut [W], v: &[u8], c: W, first: bool)
);
stamp!(
    /// [`kernel::scaled_work`] at a level.
    scaled_work [W: Work] (acc: &mut [W], v: &[W], c: W, first: bool)
);
stamp!(
    /// [`kernel::difference`] at a level.
    difference [E: Element, W: Work] (acc: &mut [W], p: &[u8], n: &[u8], c: W, first: bool)
);
stamp!(
    /// [`kernel::subtract`] at a level.
    subtract [E: Element, W: Work] (acc: &mut [W], n: &[u8])
);
stamp!(
    /// [`kernel::finish`] at a level.
    finish [E: Element, W: Work] (out: &mut [u8], t: &[u8], u: &[W]) -> bool
);
stamp!(
    /// [`kernel::finish_as`] at a level.
    finish_as [O: Element, W: Work] (out: &mut [u8], t: &[W], u: &[W]) -> bool
);
stamp!(
    /// [`kernel::change`] at a level.
    change [O: Element, W: Work] (r: &mut [W], out: &[u8], t: &[W])
);
stamp!(
    /// [`kernel::count_lost`] at a level.
    count_lost [W: Work] (u: &[W], r: &[W]) -> (u64, u64)
);
stamp!(
    /// [`kernel::dot`] at a level.
    dot [W: Work] (a: &[W], b: &[W]) -> f64
);
stamp!(
    /// [`kernel::finish_change`] at a level.
    finish_change [E: Element, W: Work] (out: &mut [u8], t: &[u8], u: &[W], r: &mut [W]) -> bool
);
stamp!(
    /// [`kernel::extent`] at a level.
    extent [W: Work] (bits: &mut [u8], x: &[W]) -> Extent<W>
);
stamp!(
    /// [`kernel::rebuilds`] at a level.
    rebuilds [E: Element, W: Work] (p: &[u8], n: &[u8], u: &[W]) -> bool
);
stamp!(
    /// [`kernel::agreement`] at a level.
    agreement [W: Work] (a: &[W], b: &[W]) -> (u64, u64)
);
stamp!(
    /// [`kernel::normal`] at a level.
    normal [W: Work] (into: &mut [W], generator: Philox, from: u64, scale: f64)
);

stamp!(
    /// [`kernel::multiply`] at a level.
    multiply [W: Work] (into: &mut [W], a: &[W], b: &[W], strides: [usize; 3], size: [usize; 3], tall: usize)
);
stamp!(
    /// [`kernel::flip`] at a level.
    flip [W: Work] (values: &mut [W], generator: Philox, from: u64)
);

/// The rounding report of at most MICRO elements, from the updates and what they changed. Not one body: compilers make better code of
/// the four loops apart.
pub fn rounding<W: Work>(level: Level, u: &[W], r: &[W]) -> Rounding {
    let (updated, lost) = count_lost(level, u, r);
    Rounding { intended: dot(level, u, u), realised: dot(level, r, r), dot: dot(level, u, r), updated, lost }
}

/// Calls `$body` with `$E` bound to the element type of a float format.
macro_rules! with_element {
    ($dtype:expr, $E:ident => $body:expr) => {
        match $dtype {
            $crate::dtype::Dtype::F64 => {
                type $E = f64;
                $body
            }
            $crate::dtype::Dtype::F32 => {
                type $E = f32;
                $body
            }
            $crate::dtype::Dtype::F16 => {
                type $E = $crate::bf16::F16;
                $body
            }
            $crate::dtype::Dtype::BF16 => {
                type $E = $crate::bf16::Bf16;
                $body
            }
            other => unreachable!("arithmetic on {other}: plans admit float formats only"),
        }
    };
}
pub(crate) use with_element;
