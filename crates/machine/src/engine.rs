//! Which engine runs the guest, and why.

use std::sync::Arc;

use wardian_cpu::{CpuModel, Engine};
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
    let (EngineChoice::Auto | EngineChoice::Soft) = args.choice;
    let offer = SoftEngine::offer(args.time);
    let model = CpuModel::host(args.cpu, &offer)
        .map_err(|source| MachineError::Model { spec: args.cpu.to_owned(), source })?;
    let options = Options { cpus: args.cpus };
    let engine = SoftEngine::new(args.memory.clone(), Arc::clone(args.time), &options)?;
    Ok((engine, Arc::new(model)))
}

/// One line that says which engine was taken and why.
pub(crate) fn reason(choice: EngineChoice) -> &'static str {
    match choice {
        EngineChoice::Soft => "Engine soft, as asked for",
        EngineChoice::Auto => "Engine soft: the only one in this build; it needs no virtualization hardware",
    }
}
