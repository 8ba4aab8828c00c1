//! The software processor: an x86-64 to x86-64 binary translator.
//!
//! *Comes in*: guest RAM, a time base, a processor model, interrupts. *Goes out*: vCPUs
//! ([`wardian_cpu::Vcpu`]) that return [`wardian_cpu::Exit`] values.
//!
//! The way of an instruction: [`vcpu`] looks its block up in [`blocks`]; if there is none, [`translate`] decodes
//! ([`decode`]) and emits ([`emit`]) one into code memory ([`code`]); the thunks ([`thunks`]) enter it; its memory
//! accesses probe the TLB tables of the context ([`ctx`]) and fall into [`access`] and the page walk of [`mmu`] when they
//! miss; privileged and odd instructions leave to [`sys`].
//!
//! **Architecture Invariant:** translated code touches the vCPU's context, its TLB tables and guest RAM, nothing else.
//! **Architecture Invariant:** an instruction either completes or leaves no trace; what it asks of the machine it
//! asks again from its start with the answers so far. **Architecture Invariant:** flags, registers and memory are
//! architectural whenever Rust code runs (flags that nobody can read before they are overwritten may be stale).
//!
//! **API Boundary:** [`SoftEngine`].
#![allow(unsafe_code, missing_docs)]

mod access;
mod bases;
mod blocks;
mod code;
mod core;
mod ctx;
mod decode;
mod emit;
mod evex;
mod exclusive;
mod fpu;
mod mmu;
mod mode;
mod shared;
mod signals;
mod state;
mod sys;
mod thunks;
mod tlb;
mod translate;
mod trap;
mod vcpu;

use std::sync::Arc;

use wardian_cpu::{Activity, Carrier, CpuModel, CpuState, Engine, EngineError, Offer, Vcpu};
use wardian_irq::LocalInterrupts;
use wardian_memory::{CodeListener, GuestMemory};
use wardian_time::TimeBase;

use crate::core::Core;
use crate::shared::Shared;
use crate::translate::Translator;
use crate::vcpu::SoftVcpu;
#[doc(hidden)]
pub use crate::vcpu::cold;

/// Choices for the engine.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// vCPUs of the machine, for CPUID's topology.
    pub cpus: usize,
}

/// The software engine of one machine.
pub struct SoftEngine {
    mem: GuestMemory,
    time: Arc<TimeBase>,
    cpus: usize,
    check: bool,
    shared: Arc<Shared>,
}

impl SoftEngine {
    /// An engine over `mem` and `time`.
    ///
    /// # Errors
    /// When the host processor lacks what translated code uses (BMI2, SSE2; AVX state is carried if present), or
    /// another engine already listens to writes of `mem`.
    pub fn new(
        mem: GuestMemory,
        time: Arc<TimeBase>,
        options: &Options,
    ) -> Result<Arc<SoftEngine>, EngineError> {
        SoftEngine::build(mem, time, options, false)
    }

    /// An engine that compares every superblock with its instructions one by one, and stops at a difference. It is slow,
    /// and for 1 vCPU.
    ///
    /// # Errors
    /// As [`SoftEngine::new`], and with more vCPUs.
    pub fn checking(
        mem: GuestMemory,
        time: Arc<TimeBase>,
        options: &Options,
    ) -> Result<Arc<SoftEngine>, EngineError> {
        if options.cpus > 1 {
            return Err(EngineError::Host("superblocks can be checked with 1 vCPU only".into()));
        }
        SoftEngine::build(mem, time, options, true)
    }

    fn build(
        mem: GuestMemory,
        time: Arc<TimeBase>,
        options: &Options,
        check: bool,
    ) -> Result<Arc<SoftEngine>, EngineError> {
        if !std::arch::is_x86_feature_detected!("bmi2") || !std::arch::is_x86_feature_detected!("avx2") {
            return Err(EngineError::Host("the processor has no AVX2 and BMI2".into()));
        }
        let shared = Arc::new(Shared::default());
        if !mem.set_code_listener(Arc::clone(&shared) as Arc<dyn CodeListener>) {
            return Err(EngineError::Host("this guest memory already has an engine".into()));
        }
        signals::install();
        Ok(Arc::new(SoftEngine { mem, time, cpus: options.cpus.max(1), check, shared }))
    }

    /// What this engine can carry, for [`CpuModel::host`].
    #[must_use]
    pub fn offer(time: &TimeBase) -> Offer {
        Offer { carrier: Carrier::Translator, avx512: fpu::carries_avx512(), tsc_hz: time.tsc_hz() }
    }
}

impl Engine for SoftEngine {
    fn name(&self) -> &'static str {
        "soft"
    }

    fn create_vcpu(
        &self,
        index: usize,
        model: &Arc<CpuModel>,
        interrupts: Arc<dyn LocalInterrupts>,
    ) -> Result<Box<dyn Vcpu>, EngineError> {
        Ok(Box::new(self.vcpu(index, model, interrupts)?))
    }
}

impl SoftEngine {
    fn vcpu(
        &self,
        index: usize,
        model: &Arc<CpuModel>,
        interrupts: Arc<dyn LocalInterrupts>,
    ) -> Result<SoftVcpu, EngineError> {
        let translator = Box::new(Translator::new((self.mem.size() / 4096) as usize)?);
        let miss = translator.code.exec(translator.thunks.leave[ctx::Leave::Lookup as usize]);
        let mailbox = self.shared.join();
        let core = Core::build(
            vcpu::Parts {
                index,
                cpus: self.cpus,
                mem: self.mem.clone(),
                time: Arc::clone(&self.time),
                model: Arc::clone(model),
                irq: interrupts,
            },
            miss,
            Arc::clone(&self.shared),
            Arc::clone(&mailbox),
        )?;
        mailbox.attach(&raw const core.c().attention);
        let mut vcpu = SoftVcpu::new(core, translator, Arc::clone(&self.shared), mailbox);
        let mut reset = CpuState::reset();
        if index != 0 {
            reset.activity = Activity::WaitForSipi;
        }
        vcpu.set_state(&reset)?;
        if self.check {
            vcpu.check_blocks();
        }
        Ok(vcpu)
    }
}
