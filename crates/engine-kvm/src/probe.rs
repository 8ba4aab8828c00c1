//! Can this KVM run a stock kernel? A tiny guest in long mode, with SSE, `cmpxchg16b` and a loop that is timed.
//!
//! Some hosts have a `/dev/kvm` without virtualization hardware behind it: the kernel then emulates the guest's
//! supervisor instructions one by one, a thousand times slower than a processor, and not all of them.

use std::sync::Arc;
use std::time::Duration;

use wardian_cpu::bits::{cr0, cr4, efer};
use wardian_cpu::{Answer, CpuModel, CpuState, Engine, EngineError, Exit, Segment, Vcpu};
use wardian_irq::{LocalInterrupts, Quiet};
use wardian_memory::{Gpa, GuestMemory};
use wardian_time::{TimeBase, host_ticks, ticks_to_nanos};

use crate::{KvmEngine, KvmHost};

const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const DIRECTORY: u64 = 0x3000;
pub(crate) const CODE: u64 = 0x4000;
pub(crate) const DATA: u64 = 0x5000;

/// The guest, at [`CODE`], with RSI at [`DATA`].
const PROGRAM: [u8; 27] = [
    0x0f, 0x10, 0x06, // movups xmm0, [rsi]
    0x66, 0x0f, 0xd4, 0xc0, // paddq xmm0, xmm0
    0x0f, 0x11, 0x06, // movups [rsi], xmm0
    0xf0, 0x48, 0x0f, 0xc7, 0x0e, // lock cmpxchg16b [rsi]
    0x48, 0x31, 0xc9, // xor rcx, rcx
    0xe6, 0x80, // out 80h, al: the clock starts
    0x48, 0xff, 0xc1, // again: inc rcx
    0xeb, 0xfb, // jmp again
    0x0f, 0x0b, // ud2
];
const RSI: usize = 6;
const RCX: usize = 1;

/// How long the loop runs.
const SPAN: Duration = Duration::from_millis(4);
/// Instructions a second below which a KVM is no hardware: a processor does a thousand times as many, hardware that is
/// itself translated on a busy host ten times; an emulator of single instructions does a fifth.
const HARDWARE: u64 = 5_000_000;

/// What the probe found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Instructions a second of a loop; 0 if it was never reached.
    pub instructions_per_second: u64,
    /// What it could not do.
    pub failure: Option<String>,
}

impl Probe {
    /// Why this KVM is none that runs stock kernels at a processor's speed, if so.
    #[must_use]
    pub fn software(&self) -> Option<String> {
        if let Some(failure) = &self.failure {
            return Some(failure.clone());
        }
        let speed = self.instructions_per_second;
        (speed < HARDWARE).then(|| {
            format!(
                "it runs {:.1} million instructions a second, as only an emulator does",
                speed as f64 / 1e6
            )
        })
    }
}

/// Long mode over one identity-mapped page of 2 MiB, the stack at its end.
fn state() -> CpuState {
    let mut state = CpuState::reset();
    let flat = |rights: u32| Segment { selector: 8, base: 0, limit: u32::MAX, rights };
    state.segments = [flat(0xc093); 6];
    state.segments[CpuState::CS] = flat(0xa09b);
    state.cr0 = cr0::PG | cr0::PE | cr0::ET | cr0::NE | cr0::MP;
    state.cr3 = PML4;
    state.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT;
    state.efer = efer::LME | efer::LMA;
    state.rip = CODE;
    state.gpr[RSI] = DATA;
    state.gpr[CpuState::RSP] = 0x1f_fff0;
    state.tr = Segment { selector: 0x10, base: 0, limit: 0xffff, rights: 0x8b };
    state
}

/// A machine of one vCPU.
pub(crate) struct Small {
    pub(crate) vcpu: Box<dyn Vcpu>,
    #[cfg_attr(not(test), expect(dead_code))]
    pub(crate) engine: Arc<KvmEngine>,
    #[cfg_attr(not(test), expect(dead_code))]
    pub(crate) memory: GuestMemory,
}

/// One that is about to run `program` in long mode.
pub(crate) fn small(
    host: &KvmHost,
    program: &[u8],
    interrupts: Arc<dyn LocalInterrupts>,
) -> Result<Small, EngineError> {
    let error = |e: &dyn std::fmt::Display| EngineError::Host(e.to_string());
    let memory = GuestMemory::new(2 << 20).map_err(|e| error(&e))?;
    for (at, entry) in [(PML4, PDPT | 3), (PDPT, DIRECTORY | 3), (DIRECTORY, 0x83)] {
        memory.write(Gpa(at), &u64::to_le_bytes(entry)).map_err(|e| error(&e))?;
    }
    memory.write(Gpa(CODE), program).map_err(|e| error(&e))?;
    let time = TimeBase::host();
    let model = CpuModel::from_host("host", &host.offer(&time), host.cpuid()).map_err(|e| error(&e))?;
    let engine = KvmEngine::new(host, memory.clone(), time, 1)?;
    let mut vcpu = engine.create_vcpu(0, &Arc::new(model), interrupts)?;
    vcpu.set_state(&state())?;
    Ok(Small { vcpu, engine, memory })
}

impl KvmHost {
    /// Runs the probe guest; takes some milliseconds.
    ///
    /// # Errors
    /// When not even a vCPU can be made.
    pub fn probe(&self) -> Result<Probe, EngineError> {
        let mut vcpu = small(self, &PROGRAM, Arc::new(Quiet))?.vcpu;
        let failed = |failure: String| Ok(Probe { instructions_per_second: 0, failure: Some(failure) });
        match vcpu.run(Answer::None) {
            Ok(Exit::PortOut { port: 0x80, .. }) => {}
            Ok(Exit::Shutdown) => {
                return failed("an instruction that every kernel uses ends in a triple fault".into());
            }
            Ok(other) => return failed(format!("an instruction that every kernel uses ends in {other:?}")),
            Err(EngineError::Unsupported { what, .. }) => return failed(what),
            Err(error) => return failed(error.to_string()),
        }
        let kicker = vcpu.kicker();
        let begin = host_ticks();
        let alarm = std::thread::spawn(move || {
            std::thread::sleep(SPAN);
            kicker.kick();
        });
        let exit = vcpu.run(Answer::None);
        let took = ticks_to_nanos(host_ticks().wrapping_sub(begin)).0.max(1);
        let _ = alarm.join();
        match exit {
            Ok(Exit::Interrupted) => {}
            Ok(other) => return failed(format!("a loop ends in {other:?}")),
            Err(error) => return failed(error.to_string()),
        }
        let instructions = u128::from(vcpu.state().gpr[RCX]) * 2;
        let per_second = instructions * 1_000_000_000 / u128::from(took);
        Ok(Probe { instructions_per_second: u64::try_from(per_second).unwrap_or(u64::MAX), failure: None })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_emulator_is_told_from_a_processor() {
        let probe = |speed, failure: Option<&str>| {
            Probe { instructions_per_second: speed, failure: failure.map(str::to_owned) }.software()
        };
        assert_eq!(probe(3_000_000_000, None), None);
        assert_eq!(probe(200_000_000, None), None);
        assert!(probe(1_100_000, None).unwrap().contains("1.1 million"));
        assert_eq!(probe(0, Some("no cmpxchg16b")), Some("no cmpxchg16b".into()));
    }

    /// On a host without a KVM that may be used there is nothing to ask.
    #[test]
    fn the_probe_comes_to_an_end() {
        match KvmHost::open() {
            Ok(host) => println!("{:?}", host.probe().unwrap()),
            Err(error) => println!("skipped: {error}"),
        }
    }
}
