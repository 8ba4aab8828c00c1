//! Which engine runs the guest, and why.

use std::sync::Arc;

use wardian_cpu::{CpuModel, Engine, EngineError};
use wardian_engine_kvm::{KvmEngine, KvmHost};
use wardian_engine_soft::{Options, SoftEngine};
use wardian_memory::GuestMemory;
use wardian_time::TimeBase;

use crate::config::{EngineChoice, Plan};
use crate::error::MachineError;

/// An engine that is decided on.
#[derive(Clone, Debug)]
pub(crate) enum Chosen {
    Soft,
    SoftCheck,
    Kvm(Arc<KvmHost>),
}

impl Chosen {
    /// As the engine calls itself.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Chosen::Soft | Chosen::SoftCheck => "soft",
            Chosen::Kvm(_) => "kvm",
        }
    }
}

/// KVM of this host, if it is good for stock kernels at a processor's speed, or why not.
fn hardware() -> Result<Arc<KvmHost>, String> {
    let host = KvmHost::open().map_err(|error| error.to_string())?;
    match host.probe() {
        Err(error) => Err(error.to_string()),
        Ok(probe) => match probe.software() {
            Some(why) => Err(software(&why)),
            None => Ok(Arc::new(host)),
        },
    }
}

/// A KVM that is software, in words.
pub(crate) fn software(why: &str) -> String {
    format!("/dev/kvm of this host is software, not virtualization hardware ({why})")
}

/// What only the software engine can do and `plan` asks for.
fn soft_only(plan: &Plan) -> Option<&'static str> {
    let config = plan.timers.time_config(plan.tsc);
    if plan.counted {
        Some("--time virtual counts instructions")
    } else if config.may_lag {
        Some("a timer policy that delays guest clocks needs every reading of them")
    } else if config.tsc == wardian_time::TscMode::Emulate {
        Some("--tsc-mode emulate makes every reading of the TSC")
    } else {
        None
    }
}

/// The engine for `plan`, and one line that says why.
pub(crate) fn decide(plan: &Plan) -> Result<(Chosen, String), MachineError> {
    let refused = |why: String| Err(MachineError::Engine(EngineError::Host(why)));
    match plan.engine {
        EngineChoice::Soft => Ok((Chosen::Soft, "Engine soft, as asked for".into())),
        EngineChoice::SoftCheck => {
            let what = "Engine soft, every superblock compared with its single instructions: slow";
            Ok((Chosen::SoftCheck, what.into()))
        }
        EngineChoice::Kvm | EngineChoice::KvmForced => {
            if let Some(why) = soft_only(plan) {
                return refused(format!("{why}, which KVM cannot: use --engine soft"));
            }
            let host = Arc::new(KvmHost::open().map_err(EngineError::from)?);
            // Whoever names the engine and has a processor with the extensions need not wait for a probe.
            let trusted = plan.engine == EngineChoice::KvmForced
                || KvmHost::has_extensions()
                || wardian_boot::is_multiboot(&plan.kernel);
            if !trusted && let Err(why) = hardware() {
                return refused(format!(
                    "{why}: a stock kernel is not expected to run there; use --engine soft, or kvm-forced to try"
                ));
            }
            Ok((Chosen::Kvm(host), "Engine kvm, as asked for".into()))
        }
        EngineChoice::Auto => {
            if let Some(why) = soft_only(plan) {
                return Ok((Chosen::Soft, format!("Engine soft: {why}")));
            }
            Ok(match hardware() {
                Ok(host) => (Chosen::Kvm(host), "Engine kvm: this host has virtualization hardware".into()),
                Err(why) => (Chosen::Soft, format!("Engine soft: {why}")),
            })
        }
    }
}

/// What an engine needs to be made.
pub(crate) struct EngineArgs<'a> {
    pub(crate) chosen: Chosen,
    pub(crate) memory: &'a GuestMemory,
    pub(crate) time: &'a Arc<TimeBase>,
    pub(crate) cpus: usize,
    /// Processor model as the user names it.
    pub(crate) cpu: &'a str,
}

/// The engine for a new machine and the processor that it offers.
pub(crate) fn make(args: &EngineArgs<'_>) -> Result<(Arc<dyn Engine>, Arc<CpuModel>), MachineError> {
    let bad_model = |source| MachineError::Model { spec: args.cpu.to_owned(), source };
    match &args.chosen {
        Chosen::Soft | Chosen::SoftCheck => {
            let model = CpuModel::host(args.cpu, &SoftEngine::offer(args.time)).map_err(bad_model)?;
            let options = Options { cpus: args.cpus };
            let make =
                if matches!(args.chosen, Chosen::Soft) { SoftEngine::new } else { SoftEngine::checking };
            let engine = make(args.memory.clone(), Arc::clone(args.time), &options)?;
            Ok((engine, Arc::new(model)))
        }
        Chosen::Kvm(host) => {
            let model =
                CpuModel::from_host(args.cpu, &host.offer(args.time), host.cpuid()).map_err(bad_model)?;
            let engine = KvmEngine::new(host, args.memory.clone(), Arc::clone(args.time), args.cpus)?;
            Ok((engine, Arc::new(model)))
        }
    }
}
