//! One pass over a fixed grid, inside a fixed budget.

pub mod budget;
pub mod gate;
pub mod line;
pub mod pass;
pub mod tile;

pub use budget::Budget;
pub use gate::{Gates, Visit, visits};
pub use line::Line;
pub use pass::{Control, Turn};
pub use tile::{BLOCK, Grid, Tile};
