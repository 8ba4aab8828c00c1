//! `wardian doctor`.

use clap::Args;
use wardian_machine::{Checkup, status};

/// What this host offers.
#[derive(Debug, Args)]
pub(crate) struct Doctor {
    /// As JSON.
    #[arg(long)]
    json: bool,
}

/// Prints it.
pub(crate) fn main(args: &Doctor) -> u8 {
    let checkup = Checkup::examine();
    if args.json {
        match serde_json::to_string_pretty(&checkup) {
            Ok(text) => println!("{text}"),
            Err(error) => {
                eprintln!("wardian: Could not write JSON: {error}");
                return status::ENGINE;
            }
        }
    } else {
        print!("{checkup}");
    }
    0
}
