//! `runc checkpoint --page-server`.

use crate::e2e::{Context, Report};

pub(super) fn cases(_: &Context, _: &mut Report) {}
