//! Lanes: one scalar body per operation ([`kernel`]), compiled once per instruction set ([`dispatch`]).
//!
//! Rust never contracts `a * b + c` and never reorders float additions, so the same body gives the same bits at every level; wider registers
//! only change how many elements go through at once. Arithmetic on bf16 that streams from memory is bound by memory, so this is nearly
//! enough: effort belongs in the number of passes and the order of I/O. Intrinsics stand only in [`dispatch`], where compilers miss
//! an instruction that compares into bits or moves what bits pick; none of them computes.

pub mod dispatch;
pub mod kernel;
pub mod level;

pub use level::Level;
