//! The processor contract: what a vCPU is, what makes it stop, what lets it go on.
//!
//! *Comes in*: a [`CpuState`], a [`CpuModel`], [`Answer`]s. *Goes out*: [`Exit`] values. Values in, values
//! out: an exit can be logged, compared between engines, replayed.
//!
//! **Architecture Invariant:** an engine never calls a device, a device never sees an engine.
//! **Architecture Invariant:** [`CpuState`] is neutral: no `kvm_*` type, no translator type, so that what
//! one engine saved another restores.
//!
//! **API Boundary:** [`Engine`], [`Vcpu`], [`Exit`], [`Answer`], [`CpuState`], [`CpuModel`].

pub mod bits;
mod exit;
mod model;
pub mod paravirt;
mod state;

use std::sync::Arc;

pub use exit::{Answer, DebugEvent, Exit};
pub use model::{
    Carrier, Carry, CpuModel, CpuidContext, FEATURES, Feature, FeatureSet, HostCpuid, ModelError, ModelState,
    Offer, Place, Row, Vendor,
};
pub use state::{Activity, CpuState, DescriptorTable, InvalidState, Msr, Segment};

use wardian_irq::{Kick, LocalInterrupts};

/// Why an engine cannot go on. The VM is lost, the host is not.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The host cannot do what the engine needs.
    #[error("This host cannot run the engine: {0}")]
    Host(String),
    /// A state that no processor can be in.
    #[error("Invalid processor state: {0}")]
    State(#[from] InvalidState),
    /// The engine met something that it does not carry.
    #[error("vCPU {vcpu} cannot go on at {rip:#x}: {what}")]
    Unsupported {
        /// Number of the vCPU.
        vcpu: usize,
        /// Guest instruction pointer (linear).
        rip: u64,
        /// What it met.
        what: String,
    },
}

/// What a debugger wants of one vCPU.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DebugRequest {
    /// Stop after each instruction.
    pub single_step: bool,
    /// Stop before the instruction at these linear addresses.
    pub breakpoints: Vec<u64>,
    /// Stop after an access to these linear ranges: (start, length, on read, on write).
    pub watchpoints: Vec<(u64, u64, bool, bool)>,
}

/// A quick look at what a vCPU is at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Glance {
    /// Linear address of the next instruction.
    pub rip: u64,
    /// In user mode (CPL 3).
    pub user: bool,
    /// RFLAGS.IF.
    pub interrupts_enabled: bool,
    /// Interrupts taken so far, without NMIs.
    pub interrupts: u64,
}

/// An interrupt that a vCPU takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// Instructions that the vCPU had retired.
    pub retired: u64,
    /// Linear address of the instruction that it interrupts.
    pub rip: u64,
    /// Vector; 2 for an NMI.
    pub vector: u8,
}

/// Told of each interrupt that a vCPU takes, just before its handler runs.
pub type OnTaken = Box<dyn FnMut(Taken) + Send>;

/// One virtual processor. Used by one thread at a time.
pub trait Vcpu: Send {
    /// Completes the exit that the last call returned with `answer` (use [`Answer::None`] the first time)
    /// and runs until the next.
    ///
    /// # Errors
    /// When the engine cannot go on.
    fn run(&mut self, answer: Answer) -> Result<Exit, EngineError>;
    /// The whole architectural state. Only meaningful between a completed answer and the next exit.
    fn state(&mut self) -> CpuState;
    /// A quick look, after any exit.
    fn glance(&mut self) -> Glance;
    /// Replaces the whole architectural state.
    ///
    /// # Errors
    /// When no processor of this model can be in that state.
    fn set_state(&mut self, state: &CpuState) -> Result<(), EngineError>;
    /// Makes `run` return [`Exit::Interrupted`] soon. Sticky: a kick while not running is not lost.
    fn kicker(&self) -> Arc<dyn Kick>;
    /// What the debugger wants from now on.
    fn set_debug(&mut self, request: &DebugRequest);
    /// Linear to physical by the vCPU's current page tables, without side effects.
    fn translate(&mut self, linear: u64) -> Option<u64>;
    /// The machine was stopped and goes on: set the kvmclock "stopped" flag and refresh the clock page.
    fn resumed(&mut self);
    /// Instructions retired so far, if they are counted: from the first [`Vcpu::set_limit`] on. A repeated string
    /// instruction counts once, when it is complete; one that faults does not count.
    fn retired(&self) -> Option<u64> {
        None
    }
    /// `run` returns [`Exit::Limit`] when so many instructions are retired, exactly, and the next one would be begun
    /// (one that waits for an answer is completed first). Counting goes on without a limit. An engine that cannot
    /// count ignores this.
    fn set_limit(&mut self, limit: Option<u64>) {
        let _ = limit;
    }
    /// Who is told of interrupts from now on.
    fn on_taken(&mut self, told: Option<OnTaken>) {
        let _ = told;
    }
    /// Named counters of this vCPU, for `inspect` and the benches.
    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}

/// Makes vCPUs.
pub trait Engine: Send + Sync {
    /// Short name, such as `soft` or `kvm`.
    fn name(&self) -> &'static str;
    /// A vCPU in its reset state (Intel SDM vol. 3A, table 9-1): vCPU 0 runs, the others wait for SIPI.
    ///
    /// # Errors
    /// When the host has no memory or rights for it.
    fn create_vcpu(
        &self,
        index: usize,
        model: &Arc<CpuModel>,
        interrupts: Arc<dyn LocalInterrupts>,
    ) -> Result<Box<dyn Vcpu>, EngineError>;
}
