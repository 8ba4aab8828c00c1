//! The devices, driven through their registers and rings as a guest's driver does it.

mod blocks;
mod driver;
mod others;
mod persist;
mod registers;
