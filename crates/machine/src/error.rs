//! What can go wrong, how a machine ends, and the process status of each.

use std::path::PathBuf;

use wardian_boot::BootError;
use wardian_cpu::{EngineError, ModelError};

use crate::config::ConfigError;

/// Process statuses. All are even, so that none can be a debug exit (`code << 1 | 1`, always odd).
pub mod status {
    /// The guest powered off.
    pub const POWER_OFF: u8 = 0;
    /// Bad input: command line, configuration, kernel, initrd, module, disk, output file.
    pub const BAD_INPUT: u8 = 2;
    /// The guest asked for a reset and `--no-reboot` was given.
    pub const RESET: u8 = 4;
    /// The guest met a triple fault.
    pub const TRIPLE_FAULT: u8 = 6;
    /// The engine cannot go on, or Wardian itself failed.
    pub const ENGINE: u8 = 8;
    /// The host refuses something that is needed: memory, threads, a socket, processor features.
    pub const HOST: u8 = 10;
    /// Ended from outside: a signal, Ctrl-a x, the debugger.
    pub const OUTSIDE: u8 = 12;

    /// The guest wrote `code` to the debug-exit port.
    #[must_use]
    pub fn debug_exit(code: u32) -> u8 {
        (code << 1 | 1) as u8
    }
}

/// A machine that cannot be built or cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The configuration.
    #[error("Bad configuration")]
    Config(#[from] ConfigError),
    /// The processor model.
    #[error("Could not make processor '{spec}'")]
    Model {
        /// What was asked for.
        spec: String,
        /// Why not.
        #[source]
        source: ModelError,
    },
    /// A disk.
    #[error("Could not attach disk {number}")]
    Disk {
        /// Its place in the list, from 0.
        number: usize,
        /// Why not.
        #[source]
        source: wardian_backend::DiskError,
    },
    /// The kernel and what goes with it.
    #[error("Could not load the guest")]
    Boot(#[from] BootError),
    /// A file for the guest's output.
    #[error("Could not create {}", path.display())]
    Output {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// Guest memory.
    #[error("Could not get guest memory")]
    Memory(#[from] wardian_memory::MemoryError),
    /// The engine.
    #[error("The engine failed")]
    Engine(#[from] EngineError),
    /// A device cannot be made or placed.
    #[error("Could not build device {device}")]
    Device {
        /// Name of the device.
        device: String,
        /// Why not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The debugger's door.
    #[error("Could not open the debugger's door")]
    Gdb(#[from] wardian_gdb::GdbError),
    /// Threads, descriptors, the terminal.
    #[error("The host refuses {what}")]
    Host {
        /// What was asked for.
        what: &'static str,
        /// Why not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A bug of ours.
    #[error("Thread {thread} panicked: {message}")]
    Panic {
        /// Name of the thread.
        thread: String,
        /// What it said.
        message: String,
    },
}

impl MachineError {
    /// The process status.
    #[must_use]
    pub fn status(&self) -> u8 {
        match self {
            MachineError::Config(_)
            | MachineError::Model { .. }
            | MachineError::Disk { .. }
            | MachineError::Output { .. } => status::BAD_INPUT,
            MachineError::Boot(BootError::Memory(_)) => status::ENGINE,
            MachineError::Boot(_) => status::BAD_INPUT,
            MachineError::Memory(_)
            | MachineError::Engine(EngineError::Host(_))
            | MachineError::Gdb(_)
            | MachineError::Host { .. } => status::HOST,
            MachineError::Engine(_) | MachineError::Device { .. } | MachineError::Panic { .. } => {
                status::ENGINE
            }
        }
    }
}

/// How a machine that ran has ended.
#[derive(Debug)]
pub enum Outcome {
    /// The guest powered off.
    PowerOff,
    /// The guest asked for a reset, which was not wanted.
    Reset,
    /// The guest wrote this to the debug-exit port.
    DebugExit(u32),
    /// The guest met a triple fault.
    TripleFault {
        /// Number of the vCPU.
        vcpu: usize,
        /// Linear address of the instruction.
        rip: u64,
    },
    /// Ended by a signal, the terminal's escape or the debugger.
    Outside,
    /// It could not go on.
    Failed(MachineError),
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Outcome::PowerOff => f.write_str("The guest powered off"),
            Outcome::Reset => f.write_str("The guest asked for a reset"),
            Outcome::DebugExit(code) => write!(f, "The guest wrote {code} to the debug-exit port"),
            Outcome::TripleFault { vcpu, rip } => {
                write!(f, "The guest met a triple fault: vCPU {vcpu} at {rip:#x}")
            }
            Outcome::Outside => f.write_str("Ended from outside"),
            Outcome::Failed(error) => error.fmt(f),
        }
    }
}

impl Outcome {
    /// The process status.
    #[must_use]
    pub fn status(&self) -> u8 {
        match self {
            Outcome::PowerOff => status::POWER_OFF,
            Outcome::Reset => status::RESET,
            Outcome::DebugExit(code) => status::debug_exit(*code),
            Outcome::TripleFault { .. } => status::TRIPLE_FAULT,
            Outcome::Outside => status::OUTSIDE,
            Outcome::Failed(error) => error.status(),
        }
    }
}
