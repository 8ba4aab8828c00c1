//! A real machine with a tiny guest, paused and ended from outside.

use std::time::{Duration, Instant};

use wardian_machine::{Config, CpuCount, Endpoint, Machine, MemorySize, Outcome};
use wardian_memory::Gpa;

const ENTRY: u32 = 0x10_0040;
const CELL: u64 = 0x20_0000;

/// A multiboot 1 kernel (ELF32) whose code is `code`.
fn kernel(code: &[u8]) -> Vec<u8> {
    let len = 0x40 + code.len() as u32;
    let mut elf = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x03\0".to_vec();
    for word in [1, ENTRY, 52, 0, 0, 52 | 32 << 16, 1, 0] {
        elf.extend_from_slice(&u32::to_le_bytes(word));
    }
    for word in [1, 0x1000, 0x10_0000, 0x10_0000, len, len, 7, 0x1000] {
        elf.extend_from_slice(&u32::to_le_bytes(word));
    }
    elf.resize(0x1000, 0);
    for word in [0x1bad_b002, 0, 0u32.wrapping_sub(0x1bad_b002)] {
        elf.extend_from_slice(&word.to_le_bytes());
    }
    elf.resize(0x1040, 0);
    elf.extend_from_slice(code);
    elf
}

#[test]
fn pauses_hold_the_guest_and_nest() {
    let path = std::env::temp_dir().join(format!("wardian-control-{}", std::process::id()));
    // inc dword [CELL]; jmp -8
    std::fs::write(&path, kernel(&[0xff, 0x05, 0, 0, 0x20, 0, 0xeb, 0xf8])).unwrap();
    let config = Config {
        kernel: Some(path.clone()),
        memory: Some(MemorySize(16 << 20)),
        cpus: Some(CpuCount(2)),
        serial: Some(Endpoint::None),
        debug_console: Some(Endpoint::None),
        ..Config::default()
    };
    let mut machine = Machine::build(config).unwrap();
    std::fs::remove_file(&path).unwrap();
    let control = machine.control();
    assert!(control.pause().is_none(), "it does not run yet");
    let thread = std::thread::spawn(move || (machine.run(), machine));
    let count = || {
        let mut cell = [0; 4];
        control.memory().map(|memory| memory.read(Gpa(CELL), &mut cell)).transpose().unwrap();
        u32::from_le_bytes(cell)
    };
    let counts_on = |what: &str| {
        let (before, begin) = (count(), Instant::now());
        while count() == before {
            assert!(begin.elapsed() < Duration::from_secs(20), "{what}");
            std::thread::yield_now();
        }
    };
    counts_on("the guest starts");
    for _ in 0..20 {
        let outer = control.pause().unwrap();
        let before = count();
        let mut seen = 0;
        assert!(control.with_vcpu(0, &mut |vcpu| seen = vcpu.state().rip as u32));
        assert!((ENTRY..ENTRY + 8).contains(&seen), "{seen:#x}");
        drop(control.pause().unwrap());
        std::thread::sleep(Duration::from_millis(1));
        assert_eq!(count(), before, "the guest stands still, also after an inner pause");
        drop(outer);
        counts_on("the guest goes on");
        assert!(!control.with_vcpu(0, &mut |_| {}), "a running vCPU cannot be looked at");
    }
    let paused = control.pause().unwrap();
    control.end();
    let (outcome, machine) = thread.join().unwrap();
    drop(paused);
    assert!(matches!(outcome, Outcome::Outside), "a paused machine ends, too: {outcome:?}");
    assert!(control.pause().is_none(), "it runs no more");
    assert_eq!(machine.stats().vcpus.len(), 2);
}
