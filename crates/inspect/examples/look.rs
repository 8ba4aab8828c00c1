//! Prints what `inspect` sees in a dump, and writes the kernel's symbols to a file: `look DIRECTORY [SYMBOLS]`.
#![forbid(unsafe_code)]

use std::path::Path;
use std::time::Instant;

use wardian_inspect::{Dump, Kernel};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let directory = std::env::args().nth(1).ok_or("look DIRECTORY [SYMBOLS]")?;
    print(&directory, std::env::args().nth(2).as_deref())
}

/// Prints it, and the symbols to a file.
pub fn print(directory: &str, symbols: Option<&str>) -> Result<(), Box<dyn std::error::Error>> {
    let dump = Dump::open(Path::new(directory))?;
    let begin = Instant::now();
    let kernel = Kernel::find(&dump.ram, &dump.vcpus)?;
    println!("@@ kernel {} in {:?}", kernel.release(), begin.elapsed());
    println!("symbols {} types {}", kernel.symbols().len(), kernel.types().is_some());
    let view = kernel.view(&dump.ram, &dump.vcpus);
    println!("build-id {:02x?} orc {}", kernel.build_id(), view.has_orc());
    let begin = Instant::now();
    println!("@@ running");
    for running in view.running() {
        println!("{running:?}");
    }
    println!("@@ modules");
    let modules = view.modules();
    for module in modules {
        println!("{} {} {:#x} {} symbols", module.name, module.size, module.text, module.symbols.len());
    }
    println!("@@ tasks");
    for task in view.tasks() {
        println!("@@ /proc/{} {} {} {:?}", task.pid, task.comm, task.state, task);
        println!("{}", view.arguments(&task).join(" "));
        for area in view.areas(task.mm) {
            println!("{:x}-{:x} {} {:x} {}", area.start, area.end, area.rights(), area.offset, area.name);
        }
        let mut program = view.program_of(task.mm);
        let stacks = view.stacks(&task, program.as_mut());
        println!("-- stack, whole: {}", stacks.kernel.whole);
        for frame in view.frames(&stacks, program.as_ref()) {
            println!(
                "   {:x} {} {} {}+{:#x}",
                frame.address,
                u8::from(frame.user),
                frame.object,
                frame.function.as_deref().unwrap_or("?"),
                frame.offset
            );
        }
    }
    println!("@@ log");
    for record in view.log().unwrap_or_default() {
        println!(
            "[{:5}.{:06}] {}",
            record.time_ns / 1_000_000_000,
            record.time_ns / 1000 % 1_000_000,
            record.text
        );
    }
    eprintln!("looked in {:?}", begin.elapsed());
    if let Some(path) = symbols {
        let mut text = String::new();
        for symbol in kernel.symbols().iter() {
            text += &format!("{:016x} {} {}\n", symbol.address, char::from(symbol.kind), symbol.name);
        }
        std::fs::write(path, text)?;
    }
    Ok(())
}
