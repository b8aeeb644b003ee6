# `make help` says what there is. Works with GNU and BSD make.

CARGO   ?= cargo
PREFIX  ?= /usr/local
DESTDIR ?=
ONLY    ?=
TARGET  ?=
LINKS   ?= sbin/sendmail bin/mailq bin/newaliases
# systemd's directory for units; empty: none are installed.
UNITDIR ?= $(PREFIX)/lib/systemd/system
# The program to install or pack, in place of the one that is built here.
ODMR    ?=

CARGO_TARGET_DIR ?= target
BUILT    = $(CARGO_TARGET_DIR)/release/odmr
PROGRAM  = $${ODMR:-$(BUILT)}
INSTALLING = PROGRAM="$(PROGRAM)" DESTDIR="$(DESTDIR)" PREFIX="$(PREFIX)" UNITDIR="$(UNITDIR)" LINKS="$(LINKS)"

.PHONY: help build test rules check house demo interop size speed soak fuzz install uninstall deb static program certs

help: ## prints this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-9s  %s\n", $$1, $$2}' Makefile

build: ## the program, target/release/odmr
	$(CARGO) build --release

test: ## every test that needs no network and no other program
	$(CARGO) test --all

rules: ## the rules of testdata/conformance.md, and the tests that prove each
	@$(CARGO) test --quiet --test all -- --ignored --nocapture --exact conformance::print_the_rules | grep '^[A-Z0-9]*-'

check: ## formatting and lints, as the automatic checks demand them
	$(CARGO) fmt --all --check
	$(CARGO) clippy --all-targets -- -D warnings

house: ## prints the modules of src/ in order, their sizes, the longest functions; and checks them (tests/house.rs)
	@RUST_BACKTRACE=0 $(CARGO) test --quiet --test all house -- --nocapture --test-threads 1

demo: ## one call: a message goes up, the line turns, a message comes down, with the dialogue
	$(CARGO) run --release -- demo

interop: build ## odmr with fetchmail, Postfix, Exim, Dovecot, mutt, cron … (as root; .ci/run installs them); ONLY=NAME for one
	tests/interop/run $(ONLY)

size: build ## octets of the program, milliseconds to its start, memory of an idle provider and customer (doc/size.md)
	tests/interop/run size

speed: build ## messages a second beside a Postfix (as root); figures only
	tests/interop/run speed

soak: program ## customers, hostile peers, kills and full disks at the same time for SECONDS (3600); a JSON line a minute, a verdict (as root)
	@seconds="$(SECONDS)"; tests/soak/run "$${seconds:-3600}"

fuzz: ## each target of fuzz/ for SECONDS (60) with libFuzzer, and a table; TARGET=NAME for one; needs cargo-fuzz and a nightly Rust
	@SECONDS_EACH="$(SECONDS)" TARGET="$(TARGET)" fuzz/run

install: program ## the program, its manual page, doc/, dist/ into DESTDIR and PREFIX (/usr/local), and LINKS to it (sbin/sendmail bin/mailq bin/newaliases)
	@$(INSTALLING) packaging/install install

uninstall: ## removes what install has copied; configuration and mail stay
	@$(INSTALLING) packaging/install uninstall

deb: program ## the Debian package of this machine's architecture, in target/
	@PROGRAM="$(PROGRAM)" packaging/deb

static: ## the program without any shared library, for Linux; needs the musl target of Rust (it says how to get it)
	@CARGO="$(CARGO)" packaging/static

# If the sources belong to another user, root builds nothing and needs no cargo: `make build && sudo make install`.
program:
	@if test -n "$(ODMR)"; then :; \
	elif test -O Cargo.toml && command -v $(CARGO) >/dev/null; then $(CARGO) build --release; \
	elif test -x "$(PROGRAM)"; then echo "$(PROGRAM) as it was built"; \
	elif test -O Cargo.toml; then echo "there is no $(CARGO) here: install Rust 1.89 or later (https://rustup.rs), or name a program that is built: make ODMR=FILE install"; exit 69; \
	else echo "there is no $(PROGRAM) yet: type \`make build\` as the user whom the sources belong to, then this again"; exit 69; fi

certs: ## a self-signed certificate and key for HOST (this host's name) into ./certs, to try things with
	@install -d certs
	@test ! -e certs/relay.key || { echo "certs/relay.key is there already"; exit 1; }
	@umask 077; host=$${HOST:-$$(hostname)}; \
	openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 365 -subj "/CN=$$host" \
	    -addext "subjectAltName=DNS:$$host,DNS:localhost,IP:127.0.0.1" \
	    -keyout certs/relay.key -out certs/relay.pem 2>/dev/null && \
	echo "certs/relay.pem and certs/relay.key for $$host, for a year; a customer trusts it by: ca = \"relay.pem\""
