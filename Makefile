# `make help` says what there is. Works with GNU and BSD make.

CARGO   ?= cargo
PREFIX  ?= /usr/local
DESTDIR ?=
ONLY    ?=
TARGET  ?=
LINKS   ?= sbin/sendmail bin/mailq bin/newaliases

.PHONY: help build test rules check house demo interop size soak fuzz install certs

help: ## what you are reading
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-8s  %s\n", $$1, $$2}' Makefile

build: ## the program, target/release/odmr
	$(CARGO) build --release

test: ## every test that needs no network and no other program
	$(CARGO) test --all

rules: ## the rules of testdata/conformance.md, and the tests that prove each
	@$(CARGO) test --quiet --test all -- --ignored --nocapture --exact conformance::print_the_rules | grep '^[A-Z0-9]*-'

check: ## formatting and lints, as the automatic checks demand them
	$(CARGO) fmt --all --check
	$(CARGO) clippy --all-targets -- -D warnings

house: ## the rooms of src/ in order, their sizes, the longest functions; and what tests/house.rs checks
	@RUST_BACKTRACE=0 $(CARGO) test --quiet --test all house -- --nocapture --test-threads 1

demo: ## one call: a message goes up, the line turns, a message comes down, with the dialogue
	$(CARGO) run --release -- demo

interop: build ## odmr with fetchmail, Postfix, Exim, Dovecot, mutt, cron … (as root; .ci/run installs them); ONLY=NAME for one
	tests/interop/run $(ONLY)

size: build ## octets of the program, milliseconds to its start, memory of an idle provider and customer (doc/size.md)
	tests/interop/run size

soak: $(if $(ODMR),,build) ## all at once for SECONDS (3600): customers, hostile peers, kills, full disks; a JSON line a minute, a verdict (as root)
	tests/soak/run $(or $(SECONDS),3600)

fuzz: ## each target of fuzz/ for SECONDS (60) with libFuzzer, and a table; TARGET=NAME for one; needs cargo-fuzz and a nightly Rust
	@SECONDS_EACH="$(SECONDS)" TARGET="$(TARGET)" fuzz/run

install: build ## the program into DESTDIR and PREFIX (/usr/local), bin/odmr, and LINKS to it (sbin/sendmail, bin/mailq, bin/newaliases)
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/sbin
	install -m 755 $${CARGO_TARGET_DIR:-target}/release/odmr $(DESTDIR)$(PREFIX)/bin/odmr
	@for link in $(LINKS); do \
	    at=$(DESTDIR)$(PREFIX)/$$link; to=../bin/odmr; case $$link in bin/*) to=odmr;; esac; \
	    if test -L $$at && test "$$(readlink $$at)" = $$to; then :; \
	    elif test -e $$at || test -L $$at; then echo "$$at belongs to another program, and stays"; \
	    else ln -s $$to $$at && echo "$$at -> $$to"; fi; \
	done

certs: ## a self-signed certificate and key for HOST (this host's name) into ./certs, to try things with
	@install -d certs
	@test ! -e certs/relay.key || { echo "certs/relay.key is there already"; exit 1; }
	@umask 077; host=$${HOST:-$$(hostname)}; \
	openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 365 -subj "/CN=$$host" \
	    -addext "subjectAltName=DNS:$$host,DNS:localhost,IP:127.0.0.1" \
	    -keyout certs/relay.key -out certs/relay.pem 2>/dev/null && \
	echo "certs/relay.pem and certs/relay.key for $$host, for a year; a customer trusts it by: ca = \"relay.pem\""
