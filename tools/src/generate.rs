//! `crxfer keygen`, `completions` and `man`: files that are made once.

use std::fs;

use clap::CommandFactory;
use crxfer::transport::Identity;

use crate::args::{Cli, CompletionsArgs, KeygenArgs, ManArgs};
use crate::error::Failed;
use crate::output;

pub(crate) fn keygen(args: &KeygenArgs) -> Result<(), Failed> {
    let identity = Identity::generate()?;
    identity.save(&args.file)?;
    output::line(&identity.fingerprint().to_string())
}

pub(crate) fn completions(args: &CompletionsArgs) -> Result<(), Failed> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "crxfer", &mut script);
    output::raw(&script)
}

pub(crate) fn man(args: &ManArgs) -> Result<(), Failed> {
    let Some(dir) = &args.dir else {
        let mut page = Vec::new();
        clap_mangen::Man::new(Cli::command())
            .render(&mut page)
            .map_err(Failed::Output)?;
        return output::raw(&page);
    };
    fs::create_dir_all(dir).map_err(Failed::file("create", dir))?;
    // `help` has no page: it only repeats the others.
    let command = Cli::command().disable_help_subcommand(true);
    clap_mangen::generate_to(command, dir).map_err(Failed::file("write man pages to", dir))
}
