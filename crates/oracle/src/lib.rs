//! The host processor as the oracle of the software engine.
//!
//! *Comes in*: a seed. *Goes out*: for each random case (one instruction or a short sequence, with registers,
//! flags, vector state and memory) whether the engine leaves exactly what the host's own processor leaves: general
//! registers, flags, x87/MMX/SSE/AVX state, memory, the exception with its error code and address.
//!
//! A case runs natively in this process, at fixed linear addresses, with its faults caught as signals
//! ([`native::Native`]); and in a guest of the engine under test, at the same linear addresses, at CPL 3 with the same
//! selectors as a Linux process, with its faults caught by an IDT ([`guest::Guest`]). What is left out, and why, is in
//! [`rules`].
//!
//! For tests and bring-up only; nothing imports this crate.

pub mod case;
pub mod encode;
pub mod generate;
pub mod guest;
pub mod native;
pub mod rng;
pub mod rules;
pub mod session;

use std::sync::Arc;

use wardian_cpu::CpuModel;
use wardian_engine_soft::SoftEngine;
use wardian_memory::GuestMemory;
use wardian_time::{Nanos, TimeBase};

use crate::case::Scope;
use crate::generate::Options;
use crate::guest::Guest;
use crate::native::Native;
use crate::session::{Session, Subject};

/// What a session is about.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// Seed.
    pub seed: u64,
    /// 64 or 32.
    pub bitness: u32,
    /// Compare flags that the manual leaves undefined, too.
    pub undefined: bool,
}

/// Whether the host's kernel punishes locked accesses that cross a cache line.
fn split_locks_allowed() -> bool {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    !text.contains("split_lock_detect") && !text.contains("bus_lock_detect")
}

/// A session for `model` with the encodings whose names `keep` accepts.
///
/// # Errors
/// When the native side cannot be set up or no encoding is left.
pub fn open(
    model: &Arc<CpuModel>,
    setup: &Setup,
    subject: Subject,
    keep: impl Fn(&str) -> bool,
) -> Result<Session, Box<dyn std::error::Error>> {
    let xcr0 = model.xcr0_mask();
    // After the engine: its signal handler is the one that this one passes foreign signals to.
    let native = Native::new(xcr0)?;
    let options = options(model, setup, keep)?;
    let scope = Scope { xcr0, wide: native::wide_layout(), undefined: setup.undefined };
    Ok(Session::new(setup.seed, options, native, subject, scope))
}

/// What the generator of such a session may do.
///
/// # Errors
/// When no encoding is left.
pub fn options(
    model: &Arc<CpuModel>,
    setup: &Setup,
    keep: impl Fn(&str) -> bool,
) -> Result<Options, Box<dyn std::error::Error>> {
    let codes: Vec<_> =
        rules::codes(model, setup.bitness).into_iter().filter(|code| keep(&format!("{code:?}"))).collect();
    if codes.is_empty() {
        return Err("No such encoding".into());
    }
    Ok(Options { bitness: setup.bitness, codes, xcr0: model.xcr0_mask(), split_locks: split_locks_allowed() })
}

/// A guest of the software engine.
///
/// # Errors
/// When the engine cannot make it.
pub fn engine(model: &Arc<CpuModel>) -> Result<Subject, Box<dyn std::error::Error>> {
    let memory = GuestMemory::new(guest::RAM)?;
    let time = TimeBase::manual(Nanos(0));
    let engine = SoftEngine::new(memory.clone(), time, &wardian_engine_soft::Options { cpus: 1 })?;
    Ok(Subject::Engine(Box::new(Guest::new(&*engine, memory, model)?)))
}
