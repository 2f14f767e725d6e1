@echo off
rem Starts the service with the flags of the stack that Alphalayer replaces; see launch.py.
cd /d "%~dp0"
if not defined PYTHON set PYTHON=python
"%PYTHON%" launch.py %*
