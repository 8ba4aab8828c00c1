//! A Linux guest read from outside: symbols, tasks, stacks, maps, modules and the kernel's log, from its memory and
//! registers alone, without an agent and without symbol files.
//!
//! *Comes in*: guest RAM ([`Physical`]) and the vCPUs' [`Registers`], of a machine that runs, that stands still or
//! that was written down. *Goes out*: a [`Kernel`], found once, and [`View`]s of the guest through it.
//!
//! What a kernel looks like is asked of the kernel itself: names out of its own symbol table, offsets out of its own
//! type information, stacks by its own unwinding tables. No table of versions is kept here.
//!
//! **Architecture Invariant:** nothing here writes to the guest. **Architecture Invariant:** every loop over what a guest
//! wrote is bounded, every size is checked before memory is taken for it; a guest that runs meanwhile may make an
//! answer incomplete, never a crash. **Architecture Invariant:** what is not certain is unknown; there are no
//! guessed names.
//!
//! **API Boundary:** [`Kernel`], [`View`], [`Program`], [`Physical`], [`Ram`], [`Dump`], [`Registers`], [`Moment`], [`Files`].
#![forbid(unsafe_code)]

mod btf;
mod dump;
mod elf;
mod error;
mod kallsyms;
mod kernel;
mod layout;
mod log;
mod maps;
mod modules;
mod moment;
mod orc;
mod pagecache;
mod paging;
mod physical;
mod registers;
mod stack;
mod symbols;
mod tasks;
mod user;
mod vmcoreinfo;

pub use btf::{Field, Types};
pub use dump::Dump;
pub use error::Error;
pub use kernel::{Files, Kernel, View};
pub use log::Record;
pub use maps::{Area, MappedFile};
pub use modules::Module;
pub use moment::{Frozen, Moment};
pub use orc::{Address, KernelStack, Start};
pub use paging::{Leaf, Space, Stretch};
pub use physical::{Physical, Ram, Region};
pub use registers::Registers;
pub use stack::{Frame, Stacks};
pub use symbols::{Symbol, Symbols};
pub use tasks::{Running, Task};
pub use user::{Mapping, Program, UserName};
pub use vmcoreinfo::VmCoreInfo;
