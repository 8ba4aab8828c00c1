//! Says hello, tells its command line, ends with the status that `exit=N` on it names (0 without).
#![no_std]
#![no_main]

use kit::{boot, io, println};

kit::guest!(main);

fn main() {
    println!("hello from a bare-metal guest");
    let line = boot::command_line();
    println!("command line: {line}");
    let code = line.split(' ').filter_map(|w| w.strip_prefix("exit=")).find_map(|n| n.parse().ok());
    io::exit(code.unwrap_or(0));
}
