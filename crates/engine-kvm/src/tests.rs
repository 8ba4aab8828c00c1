//! Guests of a few instructions, without SSE: they run on every KVM, software ones among them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::time::Duration;

use wardian_cpu::{Activity, Answer, CpuState, DebugEvent, DebugRequest, Exit};
use wardian_irq::{Kick, LocalInterrupts, PendingEvents, Quiet};
use wardian_memory::Gpa;

use crate::KvmHost;
use crate::probe::{CODE, DATA, Small, small};

/// The machine, or `None` with a word on why there is none.
fn machine(program: &[u8], interrupts: Arc<dyn LocalInterrupts>) -> Option<Small> {
    match KvmHost::open() {
        Ok(host) => Some(small(&host, program, interrupts).unwrap()),
        Err(error) => {
            println!("skipped, because {error}");
            None
        }
    }
}

fn quiet(program: &[u8]) -> Option<Small> {
    machine(program, Arc::new(Quiet))
}

/// Runs with an answer for each exit; the exits.
fn exits(machine: &mut Small, answers: &[Answer]) -> Vec<Exit> {
    answers.iter().map(|answer| machine.vcpu.run(*answer).unwrap()).collect()
}

#[test]
fn ports() {
    let Some(mut machine) = quiet(&[
        0xb0, 0x5a, // mov al, 5ah
        0xe6, 0x80, // out 80h, al
        0xe5, 0x60, // in eax, 60h
        0xba, 0xf8, 0x03, 0x00, 0x00, // mov edx, 3f8h
        0xef, // out dx, eax
        0xf4, // hlt
    ]) else {
        return;
    };
    assert_eq!(
        exits(&mut machine, &[Answer::None, Answer::None, Answer::Data(0x1234_5678), Answer::None]),
        [
            Exit::PortOut { port: 0x80, size: 1, data: 0x5a },
            Exit::PortIn { port: 0x60, size: 4 },
            Exit::PortOut { port: 0x3f8, size: 4, data: 0x1234_5678 },
            Exit::Halt,
        ]
    );
    assert_eq!(machine.vcpu.state().activity, Activity::Halted);
    assert_eq!(machine.vcpu.run(Answer::None).unwrap(), Exit::Halt, "nothing wakes it");
}

#[test]
fn device_memory() {
    let Some(mut machine) = quiet(&[
        0x48, 0xb8, 0xef, 0xcd, 0xab, 0x89, 0x67, 0x45, 0x23, 0x01, // mov rax, 0123456789abcdefh
        0x48, 0x89, 0x03, // mov [rbx], rax
        0x0f, 0xb6, 0x4b, 0x08, // movzx ecx, byte [rbx + 8]
        0xf4, // hlt
    ]) else {
        return;
    };
    // The second directory entry maps the 2 MiB behind RAM.
    machine.memory.write(Gpa(0x3008), &0x20_0083u64.to_le_bytes()).unwrap();
    let mut state = machine.vcpu.state();
    state.gpr[3] = 0x20_1000;
    machine.vcpu.set_state(&state).unwrap();
    assert_eq!(
        exits(&mut machine, &[Answer::None, Answer::None, Answer::Data(0xa5)]),
        [
            Exit::MmioWrite { gpa: 0x20_1000, size: 8, data: 0x0123_4567_89ab_cdef },
            Exit::MmioRead { gpa: 0x20_1008, size: 1 },
            Exit::Halt,
        ]
    );
    assert_eq!(machine.vcpu.state().gpr[1], 0xa5);
}

#[test]
fn a_string_of_ports_comes_one_by_one() {
    let Some(mut machine) = quiet(&[
        0xba, 0xe9, 0x00, 0x00, 0x00, // mov edx, 0e9h
        0xb9, 0x03, 0x00, 0x00, 0x00, // mov ecx, 3
        0xf3, 0x6e, // rep outsb
        0xf4, // hlt
    ]) else {
        return;
    };
    machine.memory.write(Gpa(DATA), b"abc").unwrap();
    let out = |data: u8| Exit::PortOut { port: 0xe9, size: 1, data: data.into() };
    assert_eq!(exits(&mut machine, &[Answer::None; 4]), [out(b'a'), out(b'b'), out(b'c'), Exit::Halt]);
}

#[test]
fn registers_of_the_local_apic_are_the_machines() {
    let Some(mut machine) = quiet(&[
        0xb9, 0x1b, 0x00, 0x00, 0x00, // mov ecx, IA32_APIC_BASE
        0x0f, 0x32, // rdmsr
        0xb9, 0xe0, 0x06, 0x00, 0x00, // mov ecx, IA32_TSC_DEADLINE
        0x0f, 0x30, // wrmsr
        0xb9, 0x3b, 0x00, 0x00, 0x00, // mov ecx, IA32_TSC_ADJUST
        0x31, 0xd2, // xor edx, edx
        0xb8, 0x07, 0x00, 0x00, 0x00, // mov eax, 7
        0x0f, 0x30, // wrmsr
        0x0f, 0x32, // rdmsr
        0xf4, // hlt
    ]) else {
        return;
    };
    let answers = [Answer::None, Answer::Data(0xfee0_0900), Answer::None, Answer::None];
    assert_eq!(
        exits(&mut machine, &answers),
        [
            Exit::MsrRead { index: 0x1b },
            Exit::MsrWrite { index: 0x6e0, value: 0xfee0_0900 },
            Exit::MsrWrite { index: 0x3b, value: 7 },
            Exit::Halt,
        ]
    );
    let state = machine.vcpu.state();
    assert_eq!((state.tsc_adjust, state.gpr[0]), (7, 7));
}

#[test]
fn no_kick_is_lost() {
    let Some(mut machine) = quiet(&[0x48, 0xff, 0xc1, 0xeb, 0xfb]) else { return };
    let kicker = machine.vcpu.kicker();
    kicker.kick();
    assert_eq!(machine.vcpu.run(Answer::None).unwrap(), Exit::Interrupted, "one from before");
    let seen = Arc::new(AtomicUsize::new(0));
    let other = Arc::clone(&seen);
    const KICKS: usize = 300;
    let thread = std::thread::spawn(move || {
        for n in 0..KICKS {
            kicker.kick();
            // Never more than one on the way: each must be seen.
            let mut patience = 20_000;
            while other.load(Ordering::SeqCst) <= n {
                patience -= 1;
                assert!(patience > 0, "kick {n} was lost");
                if n % 3 == 0 {
                    std::thread::yield_now();
                } else {
                    std::thread::sleep(Duration::from_micros(500));
                }
            }
        }
    });
    for _ in 0..KICKS {
        assert_eq!(machine.vcpu.run(Answer::None).unwrap(), Exit::Interrupted);
        seen.fetch_add(1, Ordering::SeqCst);
    }
    thread.join().unwrap();
    assert!(machine.vcpu.state().gpr[1] > 0, "and the guest ran");
}

#[test]
fn a_state_comes_back_as_it_went() {
    let Some(mut machine) = quiet(&[0xf4]) else { return };
    let mut state = machine.vcpu.state();
    state.gpr = std::array::from_fn(|n| 0x1111_1111_1111 * n as u64);
    state.rflags = 0x246;
    state.cr2 = 0x1234_5000;
    state.dr[0] = 0x4000;
    state.tsc_adjust = 99;
    state.nmi_blocked = true;
    state.xsave[160..176].copy_from_slice(&[0x77; 16]); // XMM0
    state.xsave[512] |= 3;
    for msr in &mut state.msrs {
        match msr.index {
            0xc000_0082 => msr.value = 0xffff_8000_0000_1000, // LSTAR
            0x2ff => msr.value = 0xc06,
            _ => {}
        }
    }
    machine.vcpu.set_state(&state).unwrap();
    let mut back = machine.vcpu.state();
    assert_eq!(back.xsave[160..176], state.xsave[160..176]);
    back.xsave.clone_from(&state.xsave);
    assert_eq!(back, state);
    state.interrupt_owed = Some(0x41);
    machine.vcpu.set_state(&state).unwrap();
    assert_eq!(machine.vcpu.state().interrupt_owed, Some(0x41));
}

/// One vector that waits, until it is taken.
#[derive(Default)]
struct One(AtomicU8);

impl LocalInterrupts for One {
    fn pending(&self) -> PendingEvents {
        PendingEvents { interrupt: self.0.load(Ordering::SeqCst) != 0, ..PendingEvents::default() }
    }
    fn acknowledge(&self) -> Option<u8> {
        Some(self.0.swap(0, Ordering::SeqCst)).filter(|vector| *vector != 0)
    }
    fn take_nmi(&self) -> bool {
        false
    }
    fn take_init(&self) -> bool {
        false
    }
    fn take_startup(&self) -> Option<u8> {
        None
    }
    fn cr8(&self) -> u8 {
        0
    }
    fn set_cr8(&self, _priority: u8) {}
    fn apic_base(&self) -> u64 {
        0xfee0_0900
    }
    fn attach(&self, _kick: Arc<dyn Kick>) {}
}

#[test]
fn an_interrupt_waits_for_its_window_and_wakes() {
    let one = Arc::new(One::default());
    let program = [
        0xe6, 0x80, // out 80h, al: interrupts are off
        0xfb, // sti
        0x90, // nop
        0x90, // nop
        0xf4, // hlt
        0xe6, 0x81, // out 81h, al
        0xf4, // hlt
    ];
    let Some(mut machine) = machine(&program, Arc::clone(&one) as _) else { return };
    // Handler of vector 30h at 4100h: out 82h, al; iretq. A GDT for its selector.
    machine.memory.write(Gpa(0x4100), &[0xe6, 0x82, 0x48, 0xcf]).unwrap();
    let gate = [0x4100 | 8 << 16, 0x8e00, 0, 0u32];
    let gate: Vec<u8> = gate.iter().flat_map(|word| word.to_le_bytes()).collect();
    machine.memory.write(Gpa(0x6000 + 0x30 * 16), &gate).unwrap();
    machine.memory.write(Gpa(0x7008), &0x00af_9b00_0000_ffffu64.to_le_bytes()).unwrap();
    let mut state = machine.vcpu.state();
    (state.idtr.base, state.idtr.limit) = (0x6000, 0xfff);
    (state.gdtr.base, state.gdtr.limit) = (0x7000, 0xf);
    // A null SS, as IRETQ to the same level takes it in long mode.
    state.segments[CpuState::SS].selector = 0;
    machine.vcpu.set_state(&state).unwrap();
    let out = |port| Exit::PortOut { port, size: 1, data: 0 };
    one.0.store(0x30, Ordering::SeqCst);
    assert_eq!(machine.vcpu.run(Answer::None).unwrap(), out(0x80), "not before STI");
    assert_eq!(machine.vcpu.run(Answer::None).unwrap(), out(0x82));
    match machine.vcpu.run(Answer::None).unwrap() {
        Exit::Halt => {}
        // A software KVM may look no earlier than at HLT.
        exit => return assert_eq!(exit, out(0x81)),
    }
    one.0.store(0x30, Ordering::SeqCst);
    assert_eq!(machine.vcpu.run(Answer::None).unwrap(), out(0x82), "out of HLT");
    assert_eq!(machine.vcpu.run(Answer::None).unwrap(), out(0x81), "behind it");
}

#[test]
fn steps_and_breakpoints() {
    let program = [0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0xf4];
    let Some(mut machine) = quiet(&program) else { return };
    machine.vcpu.set_debug(&DebugRequest { single_step: true, ..DebugRequest::default() });
    assert_eq!(exits(&mut machine, &[Answer::None; 2]), vec![Exit::Debug(DebugEvent::Step); 2]);
    assert_eq!(machine.vcpu.state().rip, CODE + 2);
    let at = |n: u64| Exit::Debug(DebugEvent::Breakpoint(CODE + n));
    let request = DebugRequest { breakpoints: vec![CODE + 3, CODE + 5], ..DebugRequest::default() };
    machine.vcpu.set_debug(&request);
    assert_eq!(machine.vcpu.run(Answer::None).unwrap(), at(3));
    let host = KvmHost::open().unwrap();
    if let Some(why) = host.probe().unwrap().software() {
        println!("skipped the rest, because RFLAGS.RF may mean nothing here: {why}");
        return;
    }
    assert_eq!(machine.vcpu.run(Answer::None).unwrap(), at(5));
    // More than there are debug registers.
    let request =
        DebugRequest { breakpoints: (6..12).map(|n| CODE + n).collect(), ..DebugRequest::default() };
    machine.vcpu.set_debug(&request);
    assert_eq!(exits(&mut machine, &[Answer::None; 2]), [at(6), at(7)]);
    machine.vcpu.set_debug(&DebugRequest::default());
    assert_eq!(machine.vcpu.run(Answer::None).unwrap(), Exit::Halt);
}

#[test]
fn written_pages_are_noted() {
    let Some(mut machine) = quiet(&[0x48, 0x89, 0x06, 0xf4]) else { return };
    assert!(machine.engine.take_dirty().is_err());
    machine.engine.log_dirty(true).unwrap();
    assert_eq!(machine.vcpu.run(Answer::None).unwrap(), Exit::Halt);
    let page = (DATA / 4096) as usize;
    let dirty = machine.engine.take_dirty().unwrap();
    assert!(dirty[page / 64] >> (page % 64) & 1 != 0, "{dirty:x?}");
    assert!(machine.engine.take_dirty().unwrap().iter().all(|word| *word == 0));
    machine.engine.log_dirty(false).unwrap();
}
