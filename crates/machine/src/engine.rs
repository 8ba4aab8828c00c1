//! Which engine runs the guest, and why.

use std::sync::Arc;

use wardian_cpu::{CpuModel, Engine, EngineError};
use wardian_engine_kvm::{KvmEngine, KvmHost};
use wardian_engine_soft::{Options, SoftEngine};
use wardian_memory::GuestMemory;
use wardian_time::TimeBase;

use crate::config::EngineChoice;
use crate::error::MachineError;

/// What an engine needs to be made.
pub(crate) struct EngineArgs<'a> {
    pub(crate) choice: EngineChoice,
    pub(crate) memory: &'a GuestMemory,
    pub(crate) time: &'a Arc<TimeBase>,
    pub(crate) cpus: usize,
    /// Processor model as the user names it.
    pub(crate) cpu: &'a str,
}

/// The engine for a new machine and the processor that it offers.
pub(crate) fn make(args: &EngineArgs<'_>) -> Result<(Arc<dyn Engine>, Arc<CpuModel>), MachineError> {
    let bad_model = |source| MachineError::Model { spec: args.cpu.to_owned(), source };
    match args.choice {
        EngineChoice::Auto | EngineChoice::Soft => {
            let model = CpuModel::host(args.cpu, &SoftEngine::offer(args.time)).map_err(bad_model)?;
            let options = Options { cpus: args.cpus };
            let engine = SoftEngine::new(args.memory.clone(), Arc::clone(args.time), &options)?;
            Ok((engine, Arc::new(model)))
        }
        EngineChoice::Kvm | EngineChoice::KvmForced => {
            let host = KvmHost::open().map_err(EngineError::from)?;
            let model =
                CpuModel::from_host(args.cpu, &host.offer(args.time), host.cpuid()).map_err(bad_model)?;
            let engine = KvmEngine::new(&host, args.memory.clone(), Arc::clone(args.time), args.cpus)?;
            Ok((engine, Arc::new(model)))
        }
    }
}

/// One line that says which engine was taken and why.
pub(crate) fn reason(choice: EngineChoice) -> &'static str {
    match choice {
        EngineChoice::Soft => "Engine soft, as asked for",
        EngineChoice::Kvm | EngineChoice::KvmForced => "Engine kvm, as asked for",
        EngineChoice::Auto => "Engine soft: it needs no virtualization hardware",
    }
}
