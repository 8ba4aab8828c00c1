//! Boots a Linux guest, pauses it when its serial console says `DUMP NOW`, and writes what `inspect` reads:
//! `memory` (sparse, low RAM then high RAM) and `machine.json` (RAM regions, vCPUs).
//!
//! `dump OUT CPUS MEMORY CMDLINE KERNEL INITRD [DISK]...`
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::time::{Duration, Instant};

use wardian_inspect::Dump;
use wardian_machine::{Config, Endpoint, Machine};

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [out, cpus, memory, cmdline, kernel, initrd, disks @ ..] = &args[..] else {
        return Err("dump OUT CPUS MEMORY CMDLINE KERNEL INITRD [DISK]...".into());
    };
    let out = PathBuf::from(out);
    std::fs::create_dir_all(&out)?;
    let serial = out.join("serial");
    let disk = disks.iter().map(|disk| disk.parse()).collect::<Result<_, _>>()?;
    let config = Config {
        kernel: Some(kernel.into()),
        initrd: Some(initrd.into()),
        cmdline: Some(cmdline.clone()),
        memory: Some(memory.parse()?),
        cpus: Some(cpus.parse()?),
        disk,
        serial: Some(Endpoint::File(serial.clone())),
        console: Some(Endpoint::None),
        debug_console: Some(Endpoint::None),
        no_reboot: true,
        ..Config::default()
    };
    let mut machine = Machine::build(config)?;
    let control = machine.control();
    let thread = std::thread::spawn(move || machine.run());
    let begin = Instant::now();
    while !std::fs::read_to_string(&serial).unwrap_or_default().contains("DUMP NOW") {
        if begin.elapsed() > Duration::from_secs(300) || thread.is_finished() {
            return Err("The guest did not say DUMP NOW".into());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    // A panic prints on after the words.
    std::thread::sleep(Duration::from_secs(1));
    let paused = control.pause().ok_or("The machine does not run")?;
    let memory = control.memory().ok_or("The machine has no memory")?;
    let mut vcpus = Vec::new();
    while control.with_vcpu(vcpus.len(), &mut |vcpu| vcpus.push(vcpu.state().into())) {}
    let mut at = 0;
    let regions = memory.ranges().into_iter().map(|range| {
        let region = (range.start, range.end - range.start, at);
        at += region.1;
        region
    });
    Dump::write(&out, memory.file(), regions, vcpus)?;
    drop(paused);
    control.end();
    let _ = thread.join();
    Ok(())
}
