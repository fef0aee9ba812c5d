//! Lanes: one scalar body per operation ([`kernel`]), compiled once per instruction set ([`dispatch`]).
//!
//! Rust never contracts `a * b + c` and never reorders float additions, so the same body gives the same bits at every level; wider registers
//! only change how many elements go through at once. Arithmetic on bf16 that streams from memory is bound by memory, so this is nearly
//! enough: effort belongs in the number of passes and the order of I/O. Intrinsics stand in [`dispatch`], where compilers miss
//! an instruction that compares into bits or moves what bits pick, and in `avx512`, for the one body that nearly every element passes through.

#[cfg(target_arch = "x86_64")]
mod avx512;
pub mod dispatch;
pub mod kernel;
pub mod level;

pub use level::Level;
